"""What the worker makes of a label map that came from a model's process."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from node.errors import OutputRefused
from node.infer.results import check_labels

LABELS = (2, 5, 300)  # with gaps, so that the largest one alone says nothing


@given(arrays(np.uint16, (2, 3, 4), elements=st.sampled_from([0, 1, 2, 5, 299, 300, 65535])))
def test_labels_that_the_manifest_does_not_declare_are_all_found(array: np.ndarray) -> None:
    unknown = sorted(set(np.unique(array).tolist()) - {0, 2, 5, 300})
    if unknown:
        with pytest.raises(OutputRefused) as caught:
            check_labels(array, LABELS)
        assert str(caught.value) == f"the model returned labels {unknown} that dicom.yaml does not declare"
    elif array.min() > 0:
        with pytest.raises(OutputRefused, match="every voxel"):
            check_labels(array, LABELS)
    else:
        check_labels(array, LABELS)
