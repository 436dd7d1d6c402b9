"""Reading the headers of a study while its quiet period passes: when it is complete, it is decided on at once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.dataset import Dataset

from node.archive.records import Study
from node.archive.store import Archive
from node.dicom.header import read_header
from node.errors import InputRefused

SILENT_S = 0.2  # nothing came for so long: what is here is probably all, and the receiver is at leisure
MOST_BYTES = 16_000_000  # of headers in files, about a tenth of what they take in memory; 5,000 slices of a CT
MOST_INSTANCES = 10_000  # of one study: even the list of more takes too long between two other things


@dataclass
class _Read:
    """What was read of a study."""

    instances: int = 0  # that it had when it was looked at
    left: list[Path] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)  # read, whatever came of it
    headers: dict[Path, Dataset] = field(default_factory=dict)
    size: int = 0  # bytes of the headers in their files


class HeadersAhead:
    """The headers of studies that are being received, as far as they were read."""

    def __init__(self, archive: Archive, most_bytes: int = MOST_BYTES):
        self._archive = archive
        self._most_bytes = most_bytes
        self._studies: dict[int, _Read] = {}

    def read(self, studies: Sequence[Study], for_s: float) -> None:
        """Read some more of these studies, for this many seconds; what was read of others is forgotten."""
        until = time.monotonic() + for_s
        for gone in self._studies.keys() - {study.id for study in studies}:
            del self._studies[gone]
        for study in studies:
            if study.last_received_at <= time.time() - SILENT_S and study.instances <= MOST_INSTANCES:
                self._read(study, until)

    def take(self, study: Study) -> Mapping[Path, Dataset]:
        """What is here of a study, once. Files never change, so it holds whatever came since."""
        return self._studies.pop(study.id, _Read()).headers

    def _read(self, study: Study, until: float) -> None:
        """Read a study's headers until the time is over or enough is kept."""
        read = self._studies.setdefault(study.id, _Read())
        if read.instances != study.instances and time.monotonic() < until:
            paths = [self._archive.storage / instance.path for instance in self._archive.instances(study.id)]
            read.left = [path for path in paths if path not in read.seen]
            read.instances = study.instances
        while read.left and time.monotonic() < until and self._size() < self._most_bytes:
            path = read.left.pop()
            read.seen.add(path)
            try:
                header = read_header(path)
            except InputRefused:  # for the decision to say
                continue
            place = getattr(header, "pixel_place", None)
            if place is not None:  # else it is damaged, and of no known size
                read.headers[path] = header
                read.size += place[1]

    def _size(self) -> int:
        return sum(read.size for read in self._studies.values())
