"""A tiny bundle that really runs: it marks what is brighter than the one number in its weights."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.infer.test_bundle import CHECKPOINT, LINEAR, configuration

MANIFEST = """\
title: Marker
intended_use: Tests only.
licence_code: Apache-2.0
licence_weights: Apache-2.0
inputs: {image: {when: {Modality: CT}}}
segments:
  1: {name: Marker, type: [99TEST, "1", Marker]}
"""


def weights(limit: float = 500.0) -> bytes:
    """The checkpoint of a network with this threshold."""
    file = io.BytesIO()
    torch.save({"limit": torch.tensor(limit)}, file)
    return file.getvalue()


def bundle_files(
    version: str = "0.1.0", *, limit: float | None = 500.0, network: str = LINEAR, **metadata: Any
) -> dict[str, bytes]:
    """Path to content of the bundle as a zoo would publish it: without `dicom.yaml`; limit None: without weights.

    `network` is the source of its class `Threshold`.
    """
    channels = {"channel_def": {"0": "background", "1": "marker"}}
    about = {"version": version, "network_data_format": {"outputs": {"pred": channels}}, **metadata}
    files = {
        "LICENSE": b"Apache License\nVersion 2.0",
        "configs/inference.json": json.dumps(configuration(handlers=[CHECKPOINT])).encode(),
        "configs/metadata.json": json.dumps(about).encode(),
        "scripts/__init__.py": b"",
        "scripts/net.py": network.encode(),
    }
    return files if limit is None else files | {"models/model.pt": weights(limit)}


def zipped(files: Mapping[str, bytes], top: str = "") -> bytes:
    """A zip file of them, below the folder `top`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for path, content in files.items():
            opened.writestr(f"{top}/{path}" if top else path, content)
    return file.getvalue()


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files as a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder
