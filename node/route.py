"""Rules to jobs: which series a route wants, which volume of them each model takes, and why or why not.

`decide` is pure and explains itself; `route_study` reads the study from the archive and records the decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset
from sqlalchemy import select, update

from node.archive import schema
from node.archive.database import record_event
from node.archive.records import JobState, Study, StudyState
from node.archive.store import Archive
from node.config import Route
from node.dicom.assembly import assemble_volumes
from node.dicom.conditions import Verdict
from node.dicom.header import read_header
from node.dicom.naming import name_plan
from node.dicom.selection import select_input
from node.errors import InputRefused, RadnodeError
from node.infer.package import Package
from node.priority import Priority
from node.queue.jobs import NewJob, add_job, job_key, requeue_job

Headers = Mapping[Path, Dataset]
LookUp = Callable[[str], Package | RadnodeError]  # a model's name to its package, or why it cannot be used


@dataclass(frozen=True)
class SeriesVerdict:
    """Why one series did or did not match one route."""

    route: str
    series_uid: str
    description: str
    modality: str
    instances: int
    verdicts: tuple[Verdict, ...]

    @property
    def matches(self) -> bool:
        """Whether every condition holds."""
        return all(verdict.holds for verdict in self.verdicts)


@dataclass(frozen=True)
class Decision:
    """What the routes want of one study."""

    jobs: tuple[NewJob, ...]
    series: tuple[SeriesVerdict, ...]  # every route with every series

    @property
    def reason(self) -> str:
        """Why no route wanted anything: for each series the first condition that failed, of the route that came
        nearest.
        """
        if not self.series:
            return "no routes are configured"
        sentences: dict[str, list[str]] = {}
        for series_uid in dict.fromkeys(verdict.series_uid for verdict in self.series):
            candidates = [verdict for verdict in self.series if verdict.series_uid == series_uid]
            nearest = max(candidates, key=lambda verdict: sum(condition.holds for condition in verdict.verdicts))
            failed = next((condition for condition in nearest.verdicts if not condition.holds), None)
            if failed is not None:
                name = nearest.description or nearest.modality or nearest.series_uid
                sentences.setdefault(f"route {nearest.route!r}: {failed}", []).append(name)
        return "; ".join(f"{sentence} ({_name_some(names)})" for sentence, names in sentences.items())


def decide(headers_by_series: Mapping[str, Headers], routes: Sequence[Route], look_up: LookUp) -> Decision:
    """What `routes` want of a study, given the headers of its series and the installed packages (or why one is not
    usable).
    """
    verdicts: list[SeriesVerdict] = []
    jobs: list[NewJob] = []
    for route in routes:
        matched: list[str] = []
        for series_uid, headers in headers_by_series.items():
            header = representative_header(headers.values())
            verdict = SeriesVerdict(
                route=route.name,
                series_uid=series_uid,
                description=str(header.get("SeriesDescription", "") or "").strip(),
                modality=str(header.get("Modality", "") or ""),
                instances=len(headers),
                verdicts=tuple(route.when.explain(header)),
            )
            verdicts.append(verdict)
            if verdict.matches:
                matched.append(series_uid)
        if matched:
            wanted = {path: header for uid in matched for path, header in headers_by_series[uid].items()}
            priority = priority_of(route, [headers_by_series[uid] for uid in matched])
            jobs += [_plan_job(route, name, wanted, look_up(name), priority) for name in route.run]
    return Decision(tuple(jobs), tuple(verdicts))


def priority_of(route: Route, series: Iterable[Headers]) -> Priority:
    """How urgent a route's jobs on these series are: as the first of its rules says that fits one of them."""
    headers = [representative_header(each.values()) for each in series]
    fitting = (rule.priority for rule in route.priority_when if any(rule.when.matches(header) for header in headers))
    return next(fitting, route.priority)


def representative_header(headers: Iterable[Dataset]) -> Dataset:
    """The header that stands for its series in conditions: the middle one by instance number, whatever order they
    came in.
    """
    ordered = sorted(headers, key=lambda header: (_instance_number(header), str(header.get("SOPInstanceUID", ""))))
    return ordered[len(ordered) // 2]


def read_headers(
    archive: Archive, study: Study, known: Mapping[Path, Dataset] | None = None
) -> dict[str, dict[Path, Dataset]]:
    """The headers of a study's instances, by series; read in parallel but for those that are `known`."""
    known = known or {}
    paths = [archive.storage / instance.path for instance in archive.instances(study.id)]
    by_series: dict[str, dict[Path, Dataset]] = {}
    with ThreadPoolExecutor(4) as pool:
        for path, header in zip(paths, pool.map(lambda one: known.get(one) or read_header(one), paths), strict=True):
            by_series.setdefault(str(header.SeriesInstanceUID), {})[path] = header
    return dict(sorted(by_series.items()))


def route_study(
    archive: Archive,
    study: Study,
    routes: Sequence[Route],
    look_up: LookUp,
    *,
    rerun_as: str = "",
    read_already: Mapping[Path, Dataset] | None = None,
) -> Decision | None:
    """Decide over a study and record it; None when an instance arrived meanwhile (then it is not complete after all),
    or another scheduler was faster.

    With `rerun_as` (the actor's name) jobs that exist already are queued again, but for those whose results were
    withdrawn: the PACS would hide the same objects again. `read_already` are headers of its instances.
    """
    decision = decide(read_headers(archive, study, read_already), routes, look_up)
    now = time.time()
    columns, jobs = schema.studies.c, schema.jobs.c
    with archive.database.write() as connection:
        # Held until the commit: an instance that arrives now waits, sees a routed study and opens it again.
        held = select(schema.studies).where(columns.id == study.id).with_for_update()
        current = Study.from_row(connection.execute(held).one())
        if current.state is StudyState.QUARANTINED or (current.instances, current.revision) != (
            study.instances,
            study.revision,
        ):
            return None
        if current.state is not study.state and not rerun_as:
            return None
        state = StudyState.ROUTED if decision.jobs else StudyState.UNWANTED
        reason = "" if decision.jobs else decision.reason
        connection.execute(
            update(schema.studies).where(columns.id == study.id).values(state=state, reason=reason, completed_at=now)
        )
        story = f"{len(decision.jobs)} jobs wanted" if decision.jobs else f"kept, no route wants it: {reason}"
        record_event(connection, "route", study.study_uid, f"complete with {study.instances} instances; {story}")
        known = [
            new for new in decision.jobs if not add_job(connection, study.id, study.study_uid, study.revision, new, now)
        ]
        keys = [job_key(new.model, new.model_digest, new.inputs) for new in known]
        again = (
            list(
                connection.scalars(select(schema.jobs.c.id).where(jobs.key.in_(keys), jobs.state != JobState.WITHDRAWN))
            )
            if rerun_as
            else []
        )
    for job_id in again:
        requeue_job(archive.database, job_id, rerun_as)
    return decision


def start_early(
    archive: Archive, study: Study, series: Mapping[str, int], routes: Sequence[Route], look_up: LookUp
) -> list[NewJob] | None:
    """Queue what `routes` want of those series of a study that are here already; None when it changed meanwhile.

    `series` has their UIDs and numbers of instances. What is not applicable yet is left to the decision over the whole
    study, and so are its state and its reason.
    """
    wanted = {uid: headers for uid, headers in read_headers(archive, study).items() if uid in series}
    jobs = [new for new in decide(wanted, routes, look_up).jobs if not new.refusal]
    now = time.time()
    columns = schema.series.c
    with archive.database.write() as connection:
        held = select(schema.studies.c.state).where(schema.studies.c.id == study.id).with_for_update()
        state = connection.scalar(held)  # held, so that of two schedulers one makes the jobs and the other finds them
        here = select(columns.series_uid, columns.instances).where(columns.study_id == study.id)
        counts = {uid: count for uid, count in connection.execute(here) if uid in series}
        if state != StudyState.RECEIVING or counts != dict(series):
            return None
        return [new for new in jobs if add_job(connection, study.id, study.study_uid, study.revision, new, now)]


def _plan_job(
    route: Route, model: str, headers: Headers, package: Package | RadnodeError, priority: Priority
) -> NewJob:
    kinds = [str(kind) for kind in route.results]
    everything = sorted(str(header.SOPInstanceUID) for header in headers.values())
    version = digest = refusal = ""
    inputs: dict[str, list[str]] = {}
    if isinstance(package, RadnodeError):
        inputs[""] = everything
        refusal = str(package)
    else:
        version, digest = package.version, package.digest
        assembly = assemble_volumes(headers)
        for name, wanted in package.manifest.inputs.items():
            try:
                choice = select_input(assembly, wanted)
                inputs[name] = name_plan(choice.plan)
            except InputRefused as error:
                refusal = str(error)
                inputs[name] = everything
    return NewJob(
        route=route.name,
        model=model,
        model_version=version,
        model_digest=digest,
        inputs=inputs,
        send_to=route.send_to,
        results=kinds,
        tell_no_result=route.tell_no_result,
        refusal=refusal,
        priority=priority,
        deadline_s=route.deadline_s,
    )


def _instance_number(header: Dataset) -> int:
    try:
        return int(header.get("InstanceNumber") or 0)
    except (TypeError, ValueError):
        return 0


def _name_some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
