"""All kinds of results from one run to two destinations that take different ones, over real sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from node.demo.pacs import Orthanc
from node.deliver.dimse import Address
from node.report.kinds import LABELMAP_STORAGE
from tests.deliver.test_dimse import storescp
from tests.report import parametric_errors  # placeholder
