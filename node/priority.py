"""How urgent a job is, in the words that orders use."""

from __future__ import annotations

from enum import StrEnum


class Priority(StrEnum):
    """Classes of jobs, the most urgent first.

    The words are those of HL7 FHIR's request priority; DICOM's Requested Procedure Priority (0040,1003) says STAT,
    HIGH, ROUTINE, MEDIUM or LOW, and the retired (0032,000C) HIGH, MED or LOW (PS3.3 C.4.11).
    """

    STAT = "stat"  # before everything else
    URGENT = "urgent"
    ROUTINE = "routine"
    BACKGROUND = "background"  # research, reprocessing: when nothing else waits

    @property
    def rank(self) -> int:
        """0 for the most urgent class."""
        return list(Priority).index(self)
