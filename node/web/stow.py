"""STOW-RS (PS3.18 10.5): instances by HTTP POST into the same archive, under the same contract as by C-STORE.

The body is read as a stream: each part goes to an unnamed file on the archive's disk, then by the importer into the
archive, so that memory stays small whatever is sent.
"""

from __future__ import annotations

import logging
import tempfile
from email.message import Message
from typing import IO

from anyio import to_thread
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from node.archive.ingest import Outcome
from node.archive.store import Archive
from node.dicom.identity import is_uid
from node.errors import ArchiveError, ArchiveFull
from node.receive.importer import Imported, import_stream
from node.receive.limits import Limits, Watermark

_log = logging.getLogger(__name__)

SOURCE = "STOW-RS"
MAXIMUM_PARTS = 20_000
_MAXIMUM_BOUNDARY = 128  # RFC 2046 5.1.1 allows 70; Orthanc 1.10 sends 73
# Failure Reason (0008,1197), PS3.18 I.2.2.
OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0xA700, 0xC000
_FAILED_SOP_SEQUENCE, _REFERENCED_SOP_SEQUENCE, _OTHER_FAILURES_SEQUENCE = "00081198", "00081199", "0008119A"


class Stow:
    """The service; one object for all requests."""

    def __init__(self, archive: Archive, limits: Limits, watermark: Watermark):
        self._archive = archive
        self._limits = limits
        self._watermark = watermark

    async def __call__(self, request: Request) -> Response:
        """Answer `POST /studies[/{study}]`."""
        study_uid = request.path_params.get("study")
        if study_uid is not None and not is_uid(study_uid):
            return _refuse(400, "the study in the path is not a UID")
        boundary, problem = _boundary(request.headers.get("content-type", ""))
        if boundary is None:
            return _refuse(415, problem)
        body = _Body(self._archive, self._limits, self._watermark, boundary, study_uid)
        try:
            async for data in request.stream():
                if data:
                    await to_thread.run_sync(body.feed, data)
            await to_thread.run_sync(body.end)
        except MultipartParseError:
            return _refuse(400, "the body is not what multipart/related promises (RFC 2387)", body.stored)
        except _TooLarge as error:
            return _refuse(413, str(error), body.stored)
        except ArchiveFull as error:
            return _refuse(507, str(error), body.stored)
        except ArchiveError as error:
            _log.error("STOW-RS: %s", error)
            return _refuse(503, "the archive cannot store now", body.stored)
        except ClientDisconnect:
            _log.info("STOW-RS: the client has gone after %d instances", len(body.stored))
            return Response(status_code=499)
        finally:
            await to_thread.run_sync(body.close)
        return _answer(body.stored)


class _TooLarge(Exception):
    """More than one request may bring."""


class _Body:
    """The body of one request, fed in pieces of any size; `stored` says what became of each part."""

    def __init__(self, archive: Archive, limits: Limits, watermark: Watermark, boundary: bytes, study_uid: str | None):
        self.stored: list[Imported] = []
        self._archive = archive
        self._limits = limits
        self._watermark = watermark
        self._study_uid = study_uid
        self._file: IO[bytes] | None = None
        self._size = 0
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._take,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> None:
        self._parser.write(data)

    def end(self) -> None:
        """The body is complete; `MultipartParseError` when its closing boundary never came."""
        self._parser.finalize()
        if not self._ended:
            raise MultipartParseError("no closing boundary")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_part(self) -> None:
        if len(self.stored) >= MAXIMUM_PARTS:
            raise _TooLarge(f"more than {MAXIMUM_PARTS} parts in one request")
        self._watermark.check()
        try:
            self._file = tempfile.TemporaryFile(dir=self._archive.storage / "spool")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ArchiveFull(f"cannot open a file in the spool: {error.strerror}") from error
        self._size = 0

    def _take(self, data: bytes, begin: int, end: int) -> None:
        assert self._file is not None
        self._size += end - begin
        if self._size > self._limits.maximum_object_bytes:
            raise _TooLarge(f"a part of more than {self._limits.maximum_object_bytes} bytes (receive.maximum_object)")
        try:
            self._file.write(memoryview(data)[begin:end])
        except OSError as error:
            raise ArchiveFull(f"cannot write to the spool: {error.strerror}") from error

    def _end_part(self) -> None:
        assert self._file is not None
        try:
            self._file.seek(0)
        except OSError as error:  # what was buffered did not reach the disk
            raise ArchiveFull(f"cannot write to the spool: {error.strerror}") from error
        name = f"part {len(self.stored) + 1}"
        kept = import_stream(self._file, name, self._archive, self._limits, source=SOURCE, study_uid=self._study_uid)
        if kept.outcome is None:
            _log.warning("audit: STOW-RS: %s refused: %s", name, kept.why)
        elif kept.outcome is Outcome.CONFLICT and kept.identity is not None:
            uid = kept.identity.sop_instance_uid
            _log.error("ALARM: instance %s came again by STOW-RS with other content: quarantined", uid)
        self.stored.append(kept)
        self.close()

    def _end(self) -> None:
        self._ended = True


def _boundary(content_type: str) -> tuple[bytes | None, str]:
    """The boundary of a multipart/related body of DICOM instances; else None and why not."""
    header = Message()
    header["content-type"] = content_type
    if header.get_content_type() != "multipart/related":
        return None, "expected Content-Type: multipart/related"
    kind = str(header.get_param("type", "application/dicom")).lower()
    if kind != "application/dicom":
        return None, f"expected type=application/dicom, found {kind[:40]!r}"
    boundary = header.get_boundary()
    if not boundary or len(boundary) > _MAXIMUM_BOUNDARY:
        return None, f"expected a boundary of 1 to {_MAXIMUM_BOUNDARY} characters"
    return boundary.encode("latin-1", "replace"), ""


def _answer(stored: list[Imported]) -> Response:
    """The Store Instances Response (PS3.18 10.5.3): 200 all, 202 some, 409 none."""
    refused = sum(one.outcome is None for one in stored)
    if not stored:
        return _refuse(400, "the body holds no part")
    status = 200 if not refused else 409 if refused == len(stored) else 202
    return JSONResponse(_module(stored), status, media_type="application/dicom+json")


def _module(stored: list[Imported]) -> dict[str, object]:
    """The Store Instances Response Module (PS3.18 I.2) as DICOM JSON."""
    sequences: dict[str, list[object]] = {}
    for one in stored:
        if one.outcome is not None and one.identity is not None:
            sequences.setdefault(_REFERENCED_SOP_SEQUENCE, []).append(_reference(one))
        elif one.identity is not None:
            failure = _reference(one) | {"00081197": {"vr": "US", "Value": [CANNOT_UNDERSTAND]}}
            sequences.setdefault(_FAILED_SOP_SEQUENCE, []).append(failure)
        else:
            failure = {"00081197": {"vr": "US", "Value": [CANNOT_UNDERSTAND]}}
            sequences.setdefault(_OTHER_FAILURES_SEQUENCE, []).append(failure)
    module: dict[str, object] = {"00081190": {"vr": "UR"}}  # Retrieve URL: empty, nothing is served from here
    return module | {tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items()}


def _reference(one: Imported) -> dict[str, object]:
    assert one.identity is not None
    return {
        "00081150": {"vr": "UI", "Value": [one.identity.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [one.identity.sop_instance_uid]},
    }


def _refuse(status: int, why: str, stored: list[Imported] | None = None) -> Response:
    """An error with its reason; what was stored before it is named, for it stays stored."""
    content: dict[str, object] = {"error": why} | (_module(stored) if stored else {})
    headers = {"Retry-After": "60"} if status in (503, 507) else {}
    return JSONResponse(content, status, headers=headers)
