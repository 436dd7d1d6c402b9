"""When a study is complete, and the life of the scheduling process: completion, routing, lost leases, retention.

DICOM gives no sign that a study is complete: PS3.4 B.4 gives no meaning to the end of an association or to the order of
instances. The sender's own count decides where it can be asked (`node.sender_count`), else a quiet period; a late
instance reopens the study as a new revision.

A route may have a shorter quiet period than the study, and may start on the series that are here while others still
come. Its jobs are then made early by the same rules, and the decision over the whole study makes the same jobs (which
are then known by their keys), or better ones, whose results replace those.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.exc import SQLAlchemyError

from node.archive import schema
from node.archive.records import Study, StudyState
from node.archive.store import Archive
from node.config import Config, Route
from node.errors import RadnodeError
from node.headers_ahead import HeadersAhead
from node.infer.shelf import PackageShelf
from node.queue.leases import fail_overdue, recover_lost_jobs
from node.route import LookUp, route_study, start_early
from node.sender_count import SenderCounts
from node.wake import Room, ring

_log = logging.getLogger(__name__)

POLL_S = 0.25
RETENTION_EVERY_S = 60.0
RECOVER_EVERY_S = 2.0
_AHEAD = 16  # studies whose headers are read before they are complete


def schedule_until(stop: threading.Event, archive: Archive, config: Config) -> None:
    """Route studies as they become complete, give back what dead workers held, delete what is old; until `stop` is
    set.
    """
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    counts = SenderCounts(archive, config)
    headers = HeadersAhead(archive)
    listening_since = time.time()
    early = EarlyStarts(config.routes, config.complete.quiet_s, listening_since)
    next_recovery = next_retention = 0.0
    while not stop.is_set():
        now = time.monotonic()
        try:
            for study in complete_studies(archive, config.complete.quiet_s, listening_since):
                if not counts.holds_back(study):
                    _route(archive, study, config, shelf, headers)
            for study in counts.all_here():
                _route(archive, study, config, shelf, headers)
            for study, new in early.start(archive, shelf.look_up):
                _log.info("study %s: %d jobs before it is complete", study.study_uid, new)
            if now >= next_recovery:
                next_recovery = now + RECOVER_EVERY_S
                for job in recover_lost_jobs(archive.database):
                    _log.warning("job %d: its worker is gone, it was given back", job.id)
                for job in fail_overdue(archive.database):
                    _log.error("job %d failed: its deadline has passed", job.id)
            if now >= next_retention:
                next_retention = now + RETENTION_EVERY_S
                for study_uid in archive.forget_finished(time.time() - config.keep.studies_s):
                    _log.info("study %s deleted: older than keep.studies", study_uid)
        except SQLAlchemyError as error:  # the database may be away for a moment; everything is found again
            _log.error("schedule: database: %s", type(error).__name__)
            stop.wait(2.0)
        stop.wait(_prepare_next(archive, headers, config.complete.quiet_s))
    counts.close()


def complete_studies(archive: Archive, quiet_s: float, listening_since: float = 0.0) -> list[Study]:
    """Studies that received nothing for `quiet_s` seconds and wait to be routed, the longest waiting first.

    Silence counts from `listening_since` on: while the node was down nobody could send. This is the one place that
    says when a study is complete.
    """
    now = time.time()
    if now - listening_since < quiet_s:
        return []
    return archive.receiving(silent_since=now - quiet_s)


def _prepare_next(archive: Archive, headers: HeadersAhead, quiet_s: float) -> float:
    """Read ahead for a moment; the seconds until the next study may be complete, `POLL_S` at most."""
    try:
        receiving = archive.receiving(most=_AHEAD)
        headers.read(receiving, POLL_S)
    except SQLAlchemyError:  # the next round says so
        return POLL_S
    due_s = receiving[0].last_received_at + quiet_s - time.time() if receiving else 0.0
    return min(POLL_S, due_s + 0.001) if due_s > 0 else POLL_S  # one that is overdue waits for something else


class EarlyStarts:
    """Jobs of routes that do not wait for the whole study.

    What was decided is remembered by what was here then, so that a study is looked at again only when more of it is
    quiet. A scheduler that starts anew looks once more, and finds the same jobs there.
    """

    def __init__(self, routes: Sequence[Route], quiet_s: float, listening_since: float = 0.0):
        """`quiet_s` is that of the study, for routes without their own; silence counts from `listening_since` on."""
        self._routes = [route for route in routes if route.start == "series" or (route.quiet_s or quiet_s) < quiet_s]
        self._quiet_s = quiet_s
        self._listening_since = listening_since
        self._decided: dict[int, dict[str, dict[str, int]]] = {}  # by study and route: series and their instances

    def start(self, archive: Archive, look_up: LookUp) -> list[tuple[Study, int]]:
        """Queue the jobs that may start now; the studies of which some were new, and how many."""
        now = time.time()
        started: list[tuple[Study, int]] = []
        if not self._routes:
            return started
        receiving = _receiving(archive)
        self._decided = {study_id: self._decided.get(study_id, {}) for study_id in receiving}
        for study_id, (study, series) in receiving.items():
            for here, routes in self._due(study_id, series, now):
                try:
                    new = start_early(archive, study, here, routes, look_up)
                except RadnodeError as error:  # the decision over the whole study says what is to be done
                    _log.warning("study %s: no early start: %s", study.study_uid, error)
                    new = []
                except SQLAlchemyError:
                    raise
                except Exception:  # one strange study must not stop the others
                    _log.exception("study %s: no early start", study.study_uid)
                    new = []
                if new is not None:
                    self._decided[study_id] |= {route.name: here for route in routes}
                    started += [(study, len(new))] if new else []
        return started

    def _due(
        self, study_id: int, series: Sequence[Row[*tuple[Any, ...]]], now: float
    ) -> list[tuple[dict[str, int], list[Route]]]:
        """Which routes may look at which series: each set with the routes that see it for the first time."""
        together: dict[frozenset[tuple[str, int]], list[Route]] = defaultdict(list)
        for route in self._routes:
            here = self._quiet_series(route, series, now)
            if here and self._decided[study_id].get(route.name) != here:
                together[frozenset(here.items())].append(route)
        return [(dict(here), routes) for here, routes in together.items()]

    def _quiet_series(self, route: Route, series: Sequence[Row[*tuple[Any, ...]]], now: float) -> dict[str, int]:
        since = now - (route.quiet_s or self._quiet_s)
        if self._listening_since > since:
            return {}
        quiet = {one.series_uid: one.instances for one in series if one.last_received_at <= since}
        return quiet if route.start == "series" or len(quiet) == len(series) else {}


def _receiving(archive: Archive) -> Mapping[int, tuple[Study, list[Row[*tuple[Any, ...]]]]]:
    """The studies that are being received, each with its series."""
    series = schema.series.c
    query = select(schema.studies).where(schema.studies.c.state == StudyState.RECEIVING)
    columns = (series.study_id, series.series_uid, series.instances, series.last_received_at)
    theirs = select(*columns).join(schema.studies).where(schema.studies.c.state == StudyState.RECEIVING)
    found: dict[int, tuple[Study, list[Row[*tuple[Any, ...]]]]] = {}
    with archive.database.read() as connection:
        for row in connection.execute(query):
            found[row.id] = (Study.from_row(row), [])
        for row in connection.execute(theirs.order_by(series.id)):
            if row.study_id in found:
                found[row.study_id][1].append(row)
    return found


def _route(archive: Archive, study: Study, config: Config, shelf: PackageShelf, headers: HeadersAhead) -> None:
    try:
        decision = route_study(archive, study, config.routes, shelf.look_up, read_already=headers.take(study))
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
            ring(archive.storage, Room.WORK)
            outcome = f"{len(decision.jobs)} jobs" if decision.jobs else "no route wants it"
            _log.info("study %s complete with %d instances: %s", study.study_uid, study.instances, outcome)
