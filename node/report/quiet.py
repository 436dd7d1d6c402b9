"""What highdicom says aside and must not be heard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Without highdicom's warning that quotes the patient's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The string ")
        yield
