"""The life of the delivering process: one thread per peer, so that a peer that is down delays nobody else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from sqlalchemy.exc import SQLAlchemyError

from node.archive.commitments import Commitments
from node.archive.database import Database
from node.archive.store import Archive
from node.deliver.commitments import report_due
from node.deliver.dimse import Address, StoreSession
from node.deliver.outbox import Parcel, due_parcels, mark_delivered, mark_undelivered
from node.errors import DeliveryError

_log = logging.getLogger(__name__)

POLL_S = 0.25


def deliver_until(stop: threading.Event, archive: Archive, peers: Mapping[str, Address]) -> None:
    """Deliver what is owed to `peers` (name to address) until `stop` is set; an object that is on its way is
    finished.
    """
    threads = [
        threading.Thread(target=_serve_peer, args=(stop, archive, name, address), name=f"deliver-{name}")
        for name, address in peers.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.wait()  # a node without a peer to send to lives too


def deliver_due(database: Database, storage: Path, name: str, address: Address, stop: threading.Event) -> int:
    """One round for one peer: everything that is due, over one association; how many objects arrived."""
    parcels = due_parcels(database, name)
    if not parcels:
        return 0
    sendable = [parcel for parcel in parcels if _is_readable(database, storage, parcel)]
    delivered = 0
    try:
        with StoreSession(address, [parcel.file(storage) for parcel in sendable]) as session:
            for parcel in sendable:
                if stop.is_set():
                    break
                try:
                    remark = session.send(parcel.file(storage))
                except DeliveryError as error:
                    _put_off(database, parcel, error)
                    if not session.is_open:
                        break  # what was not tried stays due and opens a new association in the next round
                else:
                    mark_delivered(database, parcel, remark)
                    _log.info("%s of job %d delivered to %s", parcel.kind, parcel.job_id, name)
                    delivered += 1
    except DeliveryError as error:  # no association at all: nothing was tried, all of it waits
        for parcel in sendable:
            _put_off(database, parcel, error)
    return delivered


def _serve_peer(stop: threading.Event, archive: Archive, name: str, address: Address) -> None:
    commitments = Commitments(archive)
    while not stop.is_set():
        try:
            delivered = deliver_due(archive.database, archive.storage, name, address, stop)
            delivered += report_due(commitments, name, address)
        except SQLAlchemyError as error:  # the database may be away for a moment: what is owed stays owed
            _log.error("deliver to %s: database: %s", name, type(error).__name__)
            delivered = 0
        except Exception:  # the thread's outermost loop: one strange object must not end all deliveries
            _log.exception("deliver to %s", name)
            delivered = 0
            stop.wait(5.0)
        if not delivered:
            stop.wait(POLL_S)


def _is_readable(database: Database, storage: Path, parcel: Parcel) -> bool:
    try:
        read_file_meta_info(parcel.file(storage))
    except (OSError, InvalidDicomError) as error:
        reason = f"its file in results/ cannot be read ({error.__class__.__name__}): reprocess the study"
        mark_undelivered(database, parcel, reason, permanent=True)
        return False
    return True


def _put_off(database: Database, parcel: Parcel, error: DeliveryError) -> None:
    _log.warning("%s of job %d: %s", parcel.kind, parcel.job_id, error)
    mark_undelivered(database, parcel, str(error), permanent=error.permanent)
