"""The one tree of named errors.

Each message says what was wrong, with which object (file, UID, peer, model) and what the reader can do. The command
line prints that sentence and no traceback. No message carries a patient's name, ID or birth date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class RadnodeError(Exception):
    """Every failure that radnode expects and can explain."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a file that a person wrote (configuration or model manifest)."""

    file: Path
    line: int  # 1-based; 0 when the file as a whole is meant
    field: str  # dotted path, `routes[0].when.Modality`; "" for the file as a whole
    message: str  # what was found and what was expected

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else f"{self.file}"
        return f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"


class FileProblems(RadnodeError):
    """A file that a person wrote is wrong; all of its mistakes at once."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(FileProblems):
    """The configuration is wrong."""


class ManifestError(FileProblems):
    """A model package's `dicom.yaml` is wrong."""


class ModelError(RadnodeError):
    """A model package cannot be found, trusted or loaded."""


class FetchError(RadnodeError):
    """What a model package is made of cannot be got, or is not what it must be."""


class InputRefused(RadnodeError):
    """The study holds no input that this model may be run on: an answer ('not applicable'), not a failure."""


class OutputRefused(RadnodeError):
    """What the model returned is no result (NaN, wrong grid, unknown labels): nothing is made of it."""


class ArchiveError(RadnodeError):
    """The archive cannot keep or find an object."""


class ArchiveFull(ArchiveError):
    """The disk is at its watermark or full: nothing more is accepted until space returns."""


class InstanceRefused(RadnodeError):
    """A received object is not what it must be: its bytes cannot be understood, or it is not what was announced."""


class DeliveryError(RadnodeError):
    """A peer did not take an object; `permanent` when trying again cannot help."""

    def __init__(self, message: str, *, permanent: bool = False):
        super().__init__(message)
        self.permanent = permanent


class RetrieveError(RadnodeError):
    """A peer cannot be asked what it holds, or its answer is none."""


class NotFound(RadnodeError):
    """A study, job, model or peer that a command named does not exist here."""


class NotAllowed(RadnodeError):
    """What a command asks for would do harm as things stand."""
