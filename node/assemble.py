"""When a study is complete, and the life of the scheduling process: completion, routing, lost leases, retention.

DICOM gives no sign that a study is complete: PS3.4 B.4 gives no meaning to the end of an association or to the order of
instances. The sender's own count decides where it can be asked (`node.sender_count`), else a quiet period; a late
instance reopens the study as a new revision.
"""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from node.archive import schema
from node.archive.records import Study, StudyState
from node.archive.store import Archive
from node.config import Config
from node.errors import RadnodeError
from node.infer.shelf import PackageShelf
from node.queue.leases import recover_lost_jobs
from node.route import route_study
from node.sender_count import SenderCounts

_log = logging.getLogger(__name__)

POLL_S = 0.25
RETENTION_EVERY_S = 60.0
RECOVER_EVERY_S = 2.0


def schedule_until(stop: threading.Event, archive: Archive, config: Config) -> None:
    """Route studies as they become complete, give back what dead workers held, delete what is old; until `stop` is
    set.
    """
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    counts = SenderCounts(archive, config)
    next_recovery = next_retention = 0.0
    while not stop.is_set():
        now = time.monotonic()
        try:
            for study in complete_studies(archive, config.complete.quiet_s):
                if not counts.holds_back(study):
                    _route(archive, study, config, shelf)
            for study in counts.all_here():
                _route(archive, study, config, shelf)
            if now >= next_recovery:
                next_recovery = now + RECOVER_EVERY_S
                for job in recover_lost_jobs(archive.database):
                    _log.warning("job %d: its worker is gone, it was given back", job.id)
            if now >= next_retention:
                next_retention = now + RETENTION_EVERY_S
                for study_uid in archive.forget_finished(time.time() - config.keep.studies_s):
                    _log.info("study %s deleted: older than keep.studies", study_uid)
        except SQLAlchemyError as error:  # the database may be away for a moment; everything is found again
            _log.error("schedule: database: %s", type(error).__name__)
            stop.wait(2.0)
        stop.wait(POLL_S)
    counts.close()


def complete_studies(archive: Archive, quiet_s: float) -> list[Study]:
    """Studies that received nothing for `quiet_s` seconds and wait to be routed, the longest waiting first."""
    columns = schema.studies.c
    query = (
        select(schema.studies)
        .where(columns.state == StudyState.RECEIVING, columns.last_received_at <= time.time() - quiet_s)
        .order_by(columns.last_received_at)
    )
    with archive.database.read() as connection:
        return [Study.from_row(row) for row in connection.execute(query)]


def _route(archive: Archive, study: Study, config: Config, shelf: PackageShelf) -> None:
    try:
        decision = route_study(archive, study, config.routes, shelf.look_up)
    except SQLAlchemyError:
        raise
    except RadnodeError as error:
        archive.quarantine_study(study, str(error))
        _log.error("study %s quarantined: %s", study.study_uid, error)
    except Exception as error:  # one strange study must not stop the others
        _log.exception("study %s cannot be routed", study.study_uid)
        archive.quarantine_study(
            study, f"routing failed unexpectedly ({type(error).__name__}): see the log of the node"
        )
    else:
        if decision is not None:
            outcome = f"{len(decision.jobs)} jobs" if decision.jobs else "no route wants it"
            _log.info("study %s complete with %d instances: %s", study.study_uid, study.instances, outcome)
