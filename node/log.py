"""How radnode's processes log: plain lines, and of an unexpected error where it happened, without a patient's data."""

from __future__ import annotations

import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import ClassVar

from node.errors import RadnodeError

# What is raised within these quotes values of elements or of rows: pydicom puts them into what it says of a tag.
_QUOTING = re.compile(r"[\\/](pydicom|highdicom|pynetdicom|sqlalchemy)[\\/]")
_LEFT_OUT = "(what it says is left out: it may quote a patient's data)"


def set_up_logging(*, verbose: bool) -> None:
    """Log to standard error, what matters only unless `verbose`."""
    stream = logging.StreamHandler()
    stream.setFormatter(Line())
    logging.basicConfig(level=logging.WARNING if verbose else logging.ERROR, handlers=[stream])
    logging.getLogger("node").setLevel(logging.DEBUG if verbose else logging.INFO)
    # These write element values, and so patient data, into their messages.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logging.getLogger("highdicom").setLevel(logging.CRITICAL)
    logging.getLogger("ignite").setLevel(logging.CRITICAL)  # what stops a bundle is told by our own error
    warnings.simplefilter("ignore")


class Line(logging.Formatter):
    """Plain lines; under systemd with the priority that the journal understands (sd-daemon(3)) and without a second
    clock.
    """

    _PRIORITY: ClassVar = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}

    def __init__(self) -> None:
        self._journal = "JOURNAL_STREAM" in os.environ
        super().__init__("%(message)s" if self._journal else "%(asctime)s %(levelname)-7s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journal:
            return text
        return "\n".join(f"<{self._PRIORITY.get(record.levelno, 6)}>{line}" for line in text.splitlines())

    def formatException(self, ei) -> str:
        """Where it happened and what, the first cause first."""
        return "\n".join(_describe(error) for error in reversed(list(_causes(ei[1]))))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and each that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _describe(error: BaseException) -> str:
    where = "".join(traceback.format_tb(error.__traceback__))
    return f"Traceback (most recent call last):\n{where}{type(error).__qualname__}: {_said(error)}"


def _said(error: BaseException) -> str:
    """What the error says, as far as it is surely of the program and not of a patient."""
    if isinstance(error, RadnodeError):
        return str(error)
    if _came_through(error.__traceback__) or _came_of_such(error):
        return _LEFT_OUT
    if isinstance(error, ValueError | LookupError):  # int("Doe") and a dict's KeyError quote what they were given
        return re.sub(r"""(['"]).*\1""", "'...'", str(error), flags=re.DOTALL)
    return str(error)


def _came_of_such(error: BaseException) -> bool:
    return any(_came_through(cause.__traceback__) for cause in _causes(error) if cause is not error)


def _came_through(trace: TracebackType | None) -> bool:
    return any(_QUOTING.search(frame.filename) for frame in traceback.extract_tb(trace))
