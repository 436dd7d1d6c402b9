"""Fixtures that more than one room of tests needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test data; a machine without it fails, it never skips."""
    folder = Path(os.environ.get("RADNODE_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    assert folder.is_dir(), (
        f"no test data at {folder}; set RADNODE_SHARED_DATA to the folder that holds chest_ct_philips"
    )
    return folder
