"""What becomes of a job: results kept for those who get them, what is told when there is none, what is taken back.

Between `report`, which makes objects, and `queue` and `deliver`, which owe them to peers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BufferedWriter, RawIOBase
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from typing_extensions import Buffer

from node import __version__
from node.archive.database import Database
from node.archive.files import SpoolFile
from node.archive.peer_storage import does_accept
from node.archive.records import Job, JobState, StoredResult
from node.archive.store import Archive
from node.config import Config
from node.dicom.header import read_header
from node.dicom.naming import instances_of
from node.errors import InputRefused, RadnodeError
from node.infer.manifest import Manifest
from node.infer.package import Package
from node.queue.rows import NewResult
from node.queue.withdrawal import REJECTION, earlier_reports, replaced_job, results_to_withdraw, withdraw
from node.report.kinds import LABELMAP_STORAGE, Kind, SegForm, Takes, Wanted, all_of
from node.report.negative import NoResult
from node.report.no_result import make_no_result
from node.report.rejection import RejectionReason, make_rejection
from node.report.results import Result
from node.report.subject import UNKNOWN, Origin

_log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 20
_NO_PACKAGE = "the model is not installed on this node, or must not be used; `radnode check` says why"


def what_peers_take(config: Config, database: Database, peers: Sequence[str]) -> dict[str, Takes]:
    """What each of these peers gets, by the configuration and by what it was heard to accept."""
    takes = {}
    for name in peers:
        peer = config.peers.get(name)
        kinds = tuple(Kind) if peer is None or peer.results is None else peer.results
        form = "binary" if peer is None else peer.seg
        if form == "auto":
            form = "labelmap" if does_accept(database, name, LABELMAP_STORAGE) else "binary"
        takes[name] = Takes(kinds, SegForm(form))
    return takes


def wanted_of(job: Job, takes: Mapping[str, Takes]) -> Wanted:
    """What is to be made of a job."""
    return all_of(takes.values(), [Kind(kind) for kind in job.results])


def keep_results(archive: Archive, job: Job, results: Sequence[Result], takes: Mapping[str, Takes]) -> list[NewResult]:
    """Write results durably into the archive, each with the peers that get it."""
    return [
        _keep(archive, job, result, [peer for peer, its in takes.items() if its.has(result.kind, result.forms)])
        for result in results
    ]


def previous_reports(archive: Archive, job: Job) -> tuple[Dataset, ...]:
    """The headers of the reports that this job's replaces, as far as they are still here."""
    found = earlier_reports(archive.database, job)
    return tuple(header for result in found if (header := _read(archive, result)) is not None)


def make_untold(archive: Archive, config: Config, job: Job, package: Package | None) -> list[NewResult]:
    """The objects that tell of a job without a result, kept; none when no peer of it takes any.

    `package` is the model's, where it can still be used. `InputRefused` when the images are gone.
    """
    takes = what_peers_take(config, archive.database, job.send_to)
    wanted = wanted_of(job, takes)
    uids = instances_of(name for names in job.inputs.values() for name in names)
    paths = archive.instance_paths(uids)
    if not paths:
        raise InputRefused("its images are no longer in the archive")
    usable = package if package is not None and package.digest == job.model_digest else None
    state, sentence = _why_none(job)
    origin = Origin(
        key=job.key,
        created=datetime.fromtimestamp(job.created_at, UTC),
        sources=tuple(read_header(paths[uid]) for uid in uids if uid in paths),
        manifest=usable.manifest if usable else _unknown_manifest(job.model),
        model_name=job.model,
        model_version=job.model_version or UNKNOWN,
        model_digest=job.model_digest or UNKNOWN,
        node_version=__version__,
        house=config.results.house,
        previous=previous_reports(archive, job),
    )
    return keep_results(archive, job, make_no_result(origin, state, sentence, wanted), takes)


def withdraw_job(
    archive: Archive, config: Config, job_id: int, reason: RejectionReason, comment: str, actor: str
) -> list[str]:
    """Take the results of a job back with a rejection note (IHE RAD TF-1, IOCM); the peers that will be told.

    `comment` is for people and goes into the note and the story: nothing that identifies the patient.
    """
    job, results, peers = results_to_withdraw(archive.database, job_id)
    headers = [header for result in results if (header := _read(archive, result)) is not None]
    if not headers:
        raise InputRefused(f"the result files of job {job_id} are no longer readable: withdraw them at the PACS")
    note = make_rejection(
        headers,
        reason,
        created=datetime.now(UTC),
        node_version=__version__,
        house=config.results.house,
        comment=comment,
    )
    why = f"{reason.value}" + (f" ({comment})" if comment else "")
    withdraw(archive.database, job, _keep(archive, job, Result(REJECTION, note), peers), actor, why)
    return peers


def withdraw_replaced(archive: Archive, config: Config, job: Job) -> None:
    """Take back the results that this job's replace, where they are out."""
    replaced = replaced_job(archive.database, job)
    if replaced is None:
        return
    comment = f"replaced by a newer result of {job.model} {job.model_version}"
    try:
        withdraw_job(archive, config, replaced, RejectionReason.QUALITY, comment, "work")
    except RadnodeError as error:  # the new result stands; a person may withdraw the old one
        _log.warning("job %d: %s", job.id, error)


def _keep(archive: Archive, job: Job, result: Result, peers: Sequence[str]) -> NewResult:
    # With the end of its UID: a job that fails again for another reason tells so by another object of the same name,
    # and the first one may still be owed.
    name = f"{result.name}-{result.sop_instance_uid[-8:]}.dcm"
    relative = Path("results") / job.key[:2] / job.key / name
    with archive.spool_file() as spooled:
        with BufferedWriter(_Spooled(spooled), _PIECE_BYTES) as file:
            result.write(file)
        spooled.keep(archive.storage / relative)
    uids = result.sop_instance_uid, result.sop_class_uid
    return NewResult(result.name, *uids, relative.as_posix(), spooled.size, tuple(peers))


class _Spooled(RawIOBase):
    """A file in the spool as Python's open files are, to write to only."""

    def __init__(self, file: SpoolFile):
        super().__init__()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data)
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self._file.size


def _why_none(job: Job) -> tuple[NoResult, str]:
    """What the peers are told. What is wrong with a package is its administrator's matter: paths, other packages."""
    if not job.model_digest:
        return NoResult.FAILED, _NO_PACKAGE
    state = NoResult.NOT_APPLICABLE if job.state is JobState.REFUSED else NoResult.FAILED
    return state, job.reason.removeprefix(f"{state}: ")


def _read(archive: Archive, result: StoredResult) -> Dataset | None:
    """The header of a stored result, without its bulk; None when its file is gone or damaged."""
    try:
        return dcmread(archive.storage / result.path, stop_before_pixels=True)
    except Exception:  # pydicom raises many kinds over a damaged file
        return None


def _unknown_manifest(model: str) -> Manifest:
    """What can be said of a model whose package is not here."""
    return Manifest.model_construct(title=model, inputs={})
