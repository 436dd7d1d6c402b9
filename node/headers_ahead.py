"""Reading the headers of a study while its quiet period passes: when it is complete, it is decided on at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydicom.dataset import Dataset

from node.archive.records import Study
from node.archive.store import Archive
from node.dicom.header import read_header
from node.errors import InputRefused

SILENT_S = 0.2  # nothing came for so long: what is here is probably all, and the receiver is at leisure
MOST_BYTES = 16_000_000  # of headers in files, about a tenth of what they take in memory; 5,000 slices of a CT


class HeadersAhead:
    """The headers of studies that are being received, as far as they were read."""

    def __init__(self, archive: Archive, most_bytes: int = MOST_BYTES):
        self._archive = archive
        self._most_bytes = most_bytes
        self._kept: dict[int, dict[Path, Dataset]] = {}  # by study
        self._looked_at: dict[int, int] = {}  # by study: how many instances it had when all of them were read
        self._bytes: dict[int, int] = {}

    def read(self, studies: Sequence[Study], for_s: float) -> None:
        """Read some more of these studies, for this many seconds; what was read of others is forgotten."""
        until = time.monotonic() + for_s
        for gone in self._kept.keys() - {study.id for study in studies}:
            self._forget(gone)
        for study in studies:
            is_silent = study.last_received_at <= time.time() - SILENT_S
            if is_silent and self._looked_at.get(study.id) != study.instances and not self._read(study, until):
                return

    def take(self, study: Study) -> Mapping[Path, Dataset]:
        """What is here of a study, once. Files never change, so it holds whatever came since."""
        kept = self._kept.get(study.id, {})
        self._forget(study.id)
        return kept

    def _read(self, study: Study, until: float) -> bool:
        """Read a study's headers; False when the time is over or enough is kept."""
        kept = self._kept.setdefault(study.id, {})
        for instance in self._archive.instances(study.id):
            path = self._archive.storage / instance.path
            if path in kept:
                continue
            if time.monotonic() > until or sum(self._bytes.values()) > self._most_bytes:
                return False
            try:
                header = read_header(path)
            except InputRefused:  # for the decision to say
                continue
            place = getattr(header, "pixel_place", None)
            if place is None:  # damaged, and of no known size
                continue
            kept[path] = header
            self._bytes[study.id] = self._bytes.get(study.id, 0) + place[1]
        self._looked_at[study.id] = study.instances
        return True

    def _forget(self, study_id: int) -> None:
        for each in (self._kept, self._looked_at, self._bytes):
            each.pop(study_id, None)
