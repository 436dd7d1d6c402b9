"""The life of the delivering process: one thread per peer, so that a peer that is down delays nobody else,
and one more for each that is asked for storage commitment.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pydicom.filereader import read_file_meta_info
from sqlalchemy.exc import SQLAlchemyError

from node.archive.commitments import Commitments
from node.archive.database import Database
from node.archive.peer_storage import note_accepted
from node.archive.store import Archive
from node.deliver.commitments import ask_due, report_due
from node.deliver.dimse import StoreSession, ask_storage
from node.deliver.outbox import Parcel, due_parcels, is_owed, mark_delivered, mark_undelivered
from node.deliver.peers import Destination
from node.dicom.uid import name_uid
from node.errors import DeliveryError
from node.wake import Bell, Room

_log = logging.getLogger(__name__)

POLL_S = 0.25
COMMITMENT_POLL_S = 1.0
ASK_EVERY_S = 3600.0  # what a peer takes changes when it is upgraded
ASK_AGAIN_S = 30.0  # after no answer


def deliver_until(stop: threading.Event, archive: Archive, peers: Mapping[str, Destination]) -> None:
    """Deliver what is owed to `peers` (by name) until `stop` is set; an object that is on its way is finished."""
    threads = [
        threading.Thread(target=_serve_peer, args=(stop, archive, name, peer), name=f"deliver-{name}")
        for name, peer in peers.items()
    ]
    # On threads of their own: to wait for a report holds up no delivery.
    threads += [
        threading.Thread(target=_ask_for_commitment, args=(stop, archive, name, peer), name=f"commitment-{name}")
        for name, peer in peers.items()
        if peer.commitment
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.wait()  # a node without a peer to send to lives too


def deliver_due(database: Database, storage: Path, name: str, peer: Destination, stop: threading.Event) -> int:
    """One round for one peer: everything that is due, over one association; how many objects arrived.

    Nothing where the deliverer of another machine is at it: an object goes out once.
    """
    if not due_parcels(database, name, limit=1):
        return 0
    with database.alone(f"deliver to {name}") as mine:
        return _deliver(database, storage, name, peer, stop) if mine else 0


def _deliver(database: Database, storage: Path, name: str, peer: Destination, stop: threading.Event) -> int:
    parcels = due_parcels(database, name)
    if not parcels:  # another machine has delivered it meanwhile
        return 0
    sendable = [parcel for parcel in parcels if _is_readable(database, storage, parcel)]
    delivered = 0
    try:
        files = [parcel.file(storage) for parcel in sendable]
        with StoreSession(peer.address, files, compress=peer.compress) as session:
            for parcel in sendable:
                if stop.is_set():
                    break
                if not is_owed(database, parcel):  # withdrawn since this round began
                    continue
                try:
                    remark = _send(session, parcel, storage)
                except DeliveryError as error:
                    _put_off(database, parcel, error)
                    if not session.is_open:
                        break  # what was not tried stays due and opens a new association in the next round
                else:
                    mark_delivered(database, parcel, remark, commitment=peer.commitment)
                    _log.info("%s of job %d delivered to %s", parcel.kind, parcel.job_id, name)
                    delivered += 1
    except DeliveryError as error:  # no association at all: nothing was tried, all of it waits
        for parcel in sendable:
            _put_off(database, parcel, error)
    return delivered


def _send(session: StoreSession, parcel: Parcel, storage: Path) -> str:
    """The peer's remark; whatever else than a `DeliveryError` comes of this object must not hold up those after it."""
    try:
        return session.send(parcel.file(storage))
    except DeliveryError:
        raise
    except Exception as error:
        _log.exception("%s of job %d", parcel.kind, parcel.job_id)
        raise DeliveryError(f"{type(error).__name__} in radnode: see the log of the node") from error


def _serve_peer(stop: threading.Event, archive: Archive, name: str, peer: Destination) -> None:
    commitments = Commitments(archive)
    ask_at = time.monotonic()
    bell = Bell(archive.storage, Room.DELIVER)
    while not stop.is_set():
        try:
            if peer.asks and time.monotonic() >= ask_at:
                ask_at = time.monotonic() + (ASK_EVERY_S if _ask(archive.database, name, peer) else ASK_AGAIN_S)
            delivered = deliver_due(archive.database, archive.storage, name, peer, stop)
            if commitments.due(name):
                with archive.database.alone(f"report to {name}") as mine:
                    delivered += report_due(commitments, name, peer.address) if mine else 0
        except SQLAlchemyError as error:  # the database may be away for a moment: what is owed stays owed
            _log.error("deliver to %s: database: %s", name, type(error).__name__)
            delivered = 0
        except Exception:  # the thread's outermost loop: one strange object must not end all deliveries
            _log.exception("deliver to %s", name)
            delivered = 0
            stop.wait(5.0)
        if not delivered:
            bell.wait(stop, POLL_S)
    bell.close()


def _ask_for_commitment(stop: threading.Event, archive: Archive, name: str, peer: Destination) -> None:
    while not stop.is_set():
        pause_s = COMMITMENT_POLL_S
        try:
            with archive.database.alone(f"ask {name} for commitment") as mine:
                if mine and ask_due(archive.database, name, peer.address):
                    pause_s = 0.0
        except SQLAlchemyError as error:
            _log.error("storage commitment of %s: database: %s", name, type(error).__name__)
        except Exception:  # the thread's outermost loop
            _log.exception("storage commitment of %s", name)
            pause_s = 5.0
        stop.wait(pause_s)


def _ask(database: Database, name: str, peer: Destination) -> bool:
    """Ask a peer what it takes, and keep its answer; whether there was one."""
    try:
        accepted = ask_storage(peer.address, peer.asks)
    except DeliveryError as error:
        _log.warning("%s could not be asked what it takes: %s", name, error)
        return False
    note_accepted(database, name, accepted)
    _log.info(
        "%s takes %s", name, ", ".join(f"{name_uid(each)}: {'yes' if its else 'no'}" for each, its in accepted.items())
    )
    return True


def _is_readable(database: Database, storage: Path, parcel: Parcel) -> bool:
    try:
        meta = read_file_meta_info(parcel.file(storage))
        _ = meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID
    except Exception as error:  # pydicom raises many kinds over a damaged file
        reason = f"its file in results/ cannot be read ({error.__class__.__name__}): reprocess the study"
        mark_undelivered(database, parcel, reason, permanent=True)
        return False
    return True


def _put_off(database: Database, parcel: Parcel, error: DeliveryError) -> None:
    _log.warning("%s of job %d: %s", parcel.kind, parcel.job_id, error)
    mark_undelivered(database, parcel, str(error), permanent=error.permanent)
