"""`radnode studies`, `jobs`, `deliveries`: what the archive says, and the few things that a person does to it."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from node.archive.open import open_archive
from node.archive.records import CommitmentState, DeliveryState, Job, JobState, Study, StudyState
from node.archive.store import Archive
from node.commands.output import duration, local_time, print_json, print_table
from node.commands.story import (
    commitment_s,
    delivering_s,
    explain_commitment,
    explain_delivery,
    explain_job,
    explain_receiving,
    measure,
)
from node.config import find_config, load_config
from node.deliver import outbox
from node.errors import InputRefused
from node.queue.jobs import cancel_job as cancel
from node.queue.jobs import list_jobs as jobs_of
from node.queue.jobs import prioritise_job as prioritise
from node.queue.jobs import requeue_job
from node.queue.pauses import Pause, list_pauses

ACTOR = "command line"
_MOST_ROWS = 1000  # jobs and deliveries of one study


def list_studies(options: Namespace) -> None:
    """Studies with their state and the reason for it."""
    archive = _open(options)
    rows = []
    for study in archive.studies(limit=options.limit):
        state, reason = describe_study(archive, study)
        rows.append(
            {
                "received": local_time(study.last_received_at),
                "study": study.study_uid,
                "accession": study.accession_number,
                "modalities": "/".join(sorted({series.modality for series in archive.series(study.id)})),
                "instances": study.instances,
                "state": state,
                "reason": reason,
            }
        )
    if options.json:
        print_json(rows)
    else:
        print_table(rows, list(rows[0]) if rows else [], empty="no studies yet")


def show_study(options: Namespace) -> None:
    """One study: its series, jobs, deliveries and story, and how long each stage took."""
    archive = _open(options)
    study = archive.study(options.study)
    state, reason = describe_study(archive, study)
    if study.state is StudyState.RECEIVING:
        reason = explain_receiving(study, load_config(find_config(options.config)).complete.quiet_s, time.time())
    series = [asdict(one) for one in archive.series(study.id)]
    found = jobs_of(archive.database, study_id=study.id, limit=_MOST_ROWS)
    parcels = outbox.list_parcels(archive.database, study_id=study.id, limit=_MOST_ROWS)
    pauses = list_pauses(archive.database)
    jobs = [_job_row(job, uid, pauses) for job, uid in found]
    deliveries = [_delivery_row(parcel) for parcel in parcels]
    begin, left_out, end = archive.some_events(study.study_uid, options.events)
    events = [asdict(line) for line in (*begin, *end)]
    durations = measure(study, [job for job, _ in found], [parcel.delivery for parcel in parcels])
    if options.json:
        document = {"study": asdict(study), "state": state, "reason": reason, "durations": asdict(durations)}
        document |= {"series": series, "jobs": jobs, "deliveries": deliveries}
        print_json(document | {"events": events, "events_left_out": left_out})
        return
    print(f"study      {study.study_uid}")
    print(f"accession  {study.accession_number}")
    print(f"state      {state}" + (f": {reason}" if reason else ""))
    print(
        f"instances  {study.instances}, received {local_time(study.first_received_at)} "
        f"to {local_time(study.last_received_at)}"
    )
    print("\nseries")
    print_table(series, ["series_uid", "modality", "description", "instances"], empty="none")
    print("\njobs")
    print_table(jobs, ["job", "model", "route", "state", "attempts", "took", "reason"], empty="none")
    print("\ndeliveries")
    columns = ["delivery", "job", "model", "kind", "peer", "state", "attempts", "took", "commitment", "reason"]
    print_table(deliveries, columns, empty="none")
    print("\nstory")
    started = events[0]["at"] if events else 0.0
    story = [line | {"time": local_time(line["at"]), "after": f"+{line['at'] - started:.1f} s"} for line in events]
    if left_out:
        story.insert(len(begin), _left_out(left_out))
    print_table(story, ["time", "after", "actor", "what"], empty="none")
    print(f"\ndurations  {durations.sentence()}")


def list_jobs(options: Namespace) -> None:
    """Jobs with state and reason."""
    archive = _open(options)
    study_id = archive.study(options.study).id if options.study else None
    found = jobs_of(archive.database, study_id=study_id, limit=options.limit)
    pauses = list_pauses(archive.database)
    rows = [_job_row(job, uid, pauses) for job, uid in found]
    columns = ["job", "study", "model", "route", "priority", "state", "attempts", "created", "took", "reason"]
    print_json(rows) if options.json else print_table(rows, columns, empty="no jobs yet")


def retry_job(options: Namespace) -> None:
    """Queue a job again."""
    job = requeue_job(_open(options).database, options.job, ACTOR)
    print(f"job {job.id} is {job.state.value}")


def cancel_jobs(options: Namespace) -> None:
    """Cancel jobs, by number or all open ones of a study or model."""
    archive = _open(options)
    wanted = list(options.jobs)
    if options.study or options.model:
        study_id = archive.study(options.study).id if options.study else None
        is_open = (JobState.QUEUED, JobState.RUNNING)
        found = jobs_of(archive.database, study_id=study_id, model=options.model, states=is_open, limit=None)
        wanted += [job.id for job, _ in found if job.id not in wanted]
        if not wanted:
            print("no job waits or runs there")
    elif not wanted:
        raise InputRefused("say which jobs: their numbers, --study UID or --model NAME")
    for number in wanted:
        job = cancel(archive.database, number, ACTOR)
        print(f"job {job.id} is {job.state.value}")


def prioritise_job(options: Namespace) -> None:
    """Make a job more or less urgent."""
    job = prioritise(_open(options).database, options.job, options.priority, ACTOR)
    print(f"job {job.id} is {job.priority.value}, and {job.state.value}")


def list_deliveries(options: Namespace) -> None:
    """Deliveries with state and reason."""
    archive = _open(options)
    study_id = archive.study(options.study).id if options.study else None
    rows = [
        _delivery_row(parcel)
        for parcel in outbox.list_parcels(archive.database, study_id=study_id, limit=options.limit)
    ]
    columns = ["delivery", "job", "study", "model", "kind", "peer", "state", "attempts", "delivered"]
    columns += ["commitment", "reason"]
    print_json(rows) if options.json else print_table(rows, columns, empty="no deliveries yet")


def retry_delivery(options: Namespace) -> None:
    """Send a delivery again."""
    parcel = outbox.retry_delivery(_open(options).database, options.delivery, ACTOR)
    print(f"{parcel.kind} of job {parcel.job_id} will be sent to {parcel.delivery.peer} again")


def give_up_delivery(options: Namespace) -> None:
    """Owe a delivery no longer."""
    parcel = outbox.give_up(_open(options).database, options.delivery, ACTOR)
    print(f"{parcel.kind} of job {parcel.job_id} is no longer owed to {parcel.delivery.peer}")


def describe_study(archive: Archive, study: Study) -> tuple[str, str]:
    """Where a study stands as a whole, seen over its jobs and deliveries: (state, reason)."""
    if study.state is not StudyState.ROUTED:
        return study.state.value, study.reason
    jobs = [job for job, _ in jobs_of(archive.database, study_id=study.id) if job.study_revision <= study.revision]
    for state in (JobState.RUNNING, JobState.QUEUED):
        if any(job.state is state for job in jobs):
            return state.value, "; ".join(
                f"{job.model}: {job.reason}" for job in jobs if job.state is state and job.reason
            )
    if any(job.untold for job in jobs):
        return "delivering", "; ".join(f"{job.model}: {job.reason}" for job in jobs if job.untold)
    for state, name in ((DeliveryState.FAILED, "not delivered"), (DeliveryState.PENDING, "delivering")):
        owed = outbox.list_parcels(archive.database, study_id=study.id, states=[state])
        if owed:
            return name, "; ".join(dict.fromkeys(parcel.delivery.reason for parcel in owed if parcel.delivery.reason))
    uncommitted = outbox.list_parcels(archive.database, study_id=study.id, commitments=[CommitmentState.REFUSED])
    if uncommitted:
        return "not committed", "; ".join(dict.fromkeys(one.delivery.commitment_reason for one in uncommitted))
    latest = {job.model: job for job in reversed(jobs)}.values()
    for state in (
        JobState.QUARANTINED,
        JobState.FAILED,
        JobState.REFUSED,
        JobState.CANCELLED,
        JobState.WITHDRAWN,
    ):
        if any(job.state is state for job in latest):
            return state.value, "; ".join(f"{job.model}: {job.reason}" for job in latest if job.state is state)
    return "done", "; ".join(f"{job.model}: {job.reason}" for job in latest if job.reason)


def _left_out(lines: int) -> dict[str, Any]:
    return {"time": "", "after": "", "actor": "", "what": f"... {lines} lines are left out (--events shows more)"}


def _open(options: Namespace) -> Archive:
    return open_archive(load_config(find_config(options.config)))


def _job_row(job: Job, study_uid: str, pauses: Sequence[Pause]) -> dict[str, Any]:
    now = time.time()
    end = job.finished_at if job.finished_at else now
    took = end - job.started_at if job.started_at and job.state is not JobState.QUEUED else None
    return {
        "job": job.id,
        "study": study_uid,
        "model": f"{job.model} {job.model_version}".strip(),
        "route": job.route,
        "priority": job.priority.value,
        "source": job.source,
        "state": job.state.value,
        "attempts": job.attempts,
        "created": local_time(job.created_at),
        "took": duration(took),
        "waited_s": None if job.started_at is None else job.started_at - job.queued_at,
        "running_s": took,
        "stages_s": job.seconds,
        "reason": explain_job(job, now, pauses),
        "measurements": job.measurements,
    }


def _delivery_row(parcel: outbox.Parcel) -> dict[str, Any]:
    delivery, now = parcel.delivery, time.time()
    took = delivering_s(delivery)
    return {
        "delivery": delivery.id,
        "job": parcel.job_id,
        "study": parcel.study_uid,
        "model": parcel.model,
        "kind": parcel.kind,
        "sop_instance_uid": parcel.sop_instance_uid,
        "peer": delivery.peer,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "delivered": local_time(delivery.delivered_at),
        "took": duration(took),
        "delivering_s": took,
        "commitment": explain_commitment(delivery, now),
        "commitment_state": delivery.commitment.value,
        "committed": local_time(delivery.committed_at),
        "commitment_s": commitment_s(delivery),
        "reason": explain_delivery(delivery, now),
    }
