"""C-STORE: one data set, from fragments on the wire to a durable instance and the status that says what became of it.

The bytes are written as they came: never decoded, never copied into one piece. What is refused is read to its end and
answered; only what would never end is cut (see `Limits.maximum_object_bytes`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from node.archive.files import Digester, SpoolFile
from node.archive.ingest import Outcome
from node.archive.rows_behind import RowsBehind
from node.archive.store import Archive
from node.dicom.header_scan import HeaderScan
from node.dicom.identity import is_uid
from node.dicom.uid import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION
from node.errors import ArchiveError, ArchiveFull, InstanceRefused
from node.receive.dimse import Command, Element, Status
from node.receive.limits import Limits, Watermark
from node.receive.negotiation import AcceptedContext
from node.receive.wire import AbortReason, Violation

_log = logging.getLogger(__name__)

_SHORT = struct.Struct("<HH2sH")
_LONG = struct.Struct("<HH2sHL")


@dataclass(frozen=True)
class Answer:
    """A status of PS3.4 B.2.3 and, unless it is Success, up to 64 characters of why."""

    status: int
    why: str = ""


class Storage:
    """The storage service of a process: what its associations share."""

    def __init__(self, archive: Archive, limits: Limits, watermark: Watermark):
        self.archive = archive
        self.limits = limits
        self.watermark = watermark
        self.rows_behind = None if archive.durable else RowsBehind(archive.ingest, archive.database)
        self._cores = len(os.sched_getaffinity(0))
        self._storing = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Count an association while it stores."""
        with self._lock:
            self._storing += 1
        try:
            yield
        finally:
            with self._lock:
                self._storing -= 1

    def settle(self) -> bool:
        """Have a row for everything that was acknowledged up to now; False when the database takes none."""
        return self.rows_behind is None or self.rows_behind.settle()

    def close(self) -> None:
        """End what runs beside the associations, when they have ended."""
        if self.rows_behind is not None:
            self.rows_behind.close()

    @property
    def has_core_to_spare(self) -> bool:
        """Whether a second thread per storing association pays: with fewer cores it costs (measured: four
        associations on two cores, -25 %).
        """
        return 2 * self._storing <= self._cores


class StorageSession:
    """The storage service of one association; a context manager.

    What need not come before an answer comes behind it, in `tidy`: while the sender reads its next image the last
    file's name in the spool goes, and the next file is opened.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._archive = storage.archive
        self._limits = storage.limits
        self._watermark = storage.watermark
        self._rows_behind = storage.rows_behind
        self._digester: Digester | None = None
        self._spare: SpoolFile | None = None
        self._spent: SpoolFile | None = None

    def __enter__(self) -> StorageSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for spooled in (self._spent, self._spare):
            if spooled is not None:
                spooled.close()
        self._spent = self._spare = None
        if self._digester is not None:
            self._digester.close()

    def store(self, request: Command, context: AcceptedContext, sender: str, fragments: Iterator[memoryview]) -> Answer:
        """Keep one instance; `fragments` are the bytes of its data set, each valid until the next.

        All of them are read, whatever the answer is. `PeerGone` and `Violation` of the wire leave nothing behind.
        """
        with self._storage.storing():
            answer = self._store(request, context, sender, fragments)
            for _ in fragments:  # what was refused half-way comes to its end before the answer
                pass
        return answer

    def tidy(self) -> None:
        """Clean up behind the last answer and prepare for the next image."""
        if self._spent is not None:
            self._spent.close()
            self._spent = None
        if self._spare is None:
            with contextlib.suppress(ArchiveError):  # the next image asks again, and hears why
                self._spare = self._new_file()

    def _new_file(self) -> SpoolFile:
        if not self._storage.has_core_to_spare:
            return self._archive.spool_file(relaxed=self._rows_behind is not None)
        self._digester = self._digester or Digester()
        return self._archive.spool_file(self._digester, relaxed=self._rows_behind is not None)

    def _store(
        self, request: Command, context: AcceptedContext, sender: str, fragments: Iterator[memoryview]
    ) -> Answer:
        sop_class = request.uid(Element.AFFECTED_SOP_CLASS_UID)
        sop_instance = request.uid(Element.AFFECTED_SOP_INSTANCE_UID)
        if sop_class != context.abstract_syntax:
            return Answer(Status.DATA_SET_MISMATCH, "SOP class is not the presentation context's")
        if not is_uid(sop_instance):
            return Answer(Status.CANNOT_UNDERSTAND, "Affected SOP Instance UID is not a UID")
        try:
            self._watermark.check()
            spooled = self._spent = self._spare or self._new_file()
            self._spare = None
            spooled.write(file_header(sop_class, sop_instance, context.transfer_syntax, sender), hashed=False)
            scan = HeaderScan(context.transfer_syntax, maximum_inflated_bytes=self._limits.maximum_inflated_bytes)
            self._take(fragments, spooled, scan)
            identity = scan.identity()
            if identity.sop_class_uid != sop_class:
                return Answer(Status.DATA_SET_MISMATCH, "data set is of another SOP class than announced")
            if identity.sop_instance_uid != sop_instance:
                return Answer(Status.DATA_SET_MISMATCH, "data set has another SOP Instance UID than announced")
            if self._rows_behind is not None:
                self._rows_behind.take(spooled, identity, sender)
                self._spent = None
                return Answer(Status.SUCCESS)
            outcome = self._archive.keep_instance(spooled, identity, sender)
        except InstanceRefused as error:
            return Answer(Status.CANNOT_UNDERSTAND, str(error))
        except ArchiveFull as error:
            return Answer(Status.OUT_OF_RESOURCES, str(error))
        except ArchiveError as error:
            _log.error("an instance from %s was not acknowledged: %s", sender, error)
            return Answer(Status.OUT_OF_RESOURCES, "the archive cannot store now")
        if outcome is Outcome.CONFLICT:
            _log.error("ALARM: instance %s came again from %s with other content: quarantined", sop_instance, sender)
        return Answer(Status.SUCCESS)

    def _take(self, fragments: Iterator[memoryview], spooled: SpoolFile, scan: HeaderScan) -> None:
        limit = self._limits.maximum_object_bytes
        for data in fragments:
            spooled.write(data)
            if scan.wants_more:
                scan.feed(data)
            if spooled.size > limit:
                raise Violation(f"a data set of more than {limit} bytes", AbortReason.NOT_SPECIFIED)


def file_header(sop_class: str, sop_instance: str, transfer_syntax: str, sender: str) -> bytes:
    """Preamble, prefix and File Meta Information (PS3.10 7.1) of a data set that AE title `sender` sent."""
    elements = b"".join(
        (
            _LONG.pack(2, 0x0001, b"OB", 0, 2) + b"\x00\x01",
            _text(0x0002, b"UI", sop_class),
            _text(0x0003, b"UI", sop_instance),
            _text(0x0010, b"UI", transfer_syntax),
            _text(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            _text(0x0013, b"SH", IMPLEMENTATION_VERSION),
            _text(0x0016, b"AE", sender),
        )
    )
    return bytes(128) + b"DICM" + _SHORT.pack(2, 0, b"UL", 4) + struct.pack("<L", len(elements)) + elements


def _text(element: int, vr: bytes, value: str) -> bytes:
    data = value.encode("ascii", "replace")
    if len(data) % 2:
        data += b"\0" if vr == b"UI" else b" "
    return _SHORT.pack(2, element, vr, len(data)) + data
