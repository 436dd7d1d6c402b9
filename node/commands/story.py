"""A study from its first image to the PACS's commitment: states that explain themselves, and how long each stage took.

Pure functions on records; `node.commands.listing` prints what they say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from node.archive.records import CommitmentState, Delivery, DeliveryState, Job, JobState, Study, StudyState
from node.commands.output import duration
from node.queue.pauses import Pause


@dataclass(frozen=True)
class Durations:
    """Seconds of each stage of a study's present revision; None for what has not happened, or is not known.

    Of several jobs and deliveries a stage takes as long as its longest.
    """

    receiving_s: float | None  # first to last image
    quiet_s: float | None  # last image to the decision that the study is complete
    waiting_s: float | None  # a job queued to its (last) attempt started
    running_s: float | None  # that attempt
    stages_s: dict[str, float]  # read, infer and so on, of the job that ran longest
    delivering_s: float | None  # a result made to Success at its peer
    commitment_s: float | None  # Success to the peer's commitment
    total_s: float | None  # last image to the last Success, once nothing is open

    def sentence(self) -> str:
        """One line for people."""
        stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in self.stages_s.items())
        named = (
            ("receiving", self.receiving_s, ""),
            ("quiet period", self.quiet_s, ""),
            ("waiting", self.waiting_s, ""),
            ("running", self.running_s, f" ({stages})" if stages else ""),
            ("delivering", self.delivering_s, ""),
            ("commitment", self.commitment_s, ""),
            ("last image to last result", self.total_s, ""),
        )
        return "; ".join(f"{name} {duration(seconds)}{tail}" for name, seconds, tail in named if seconds is not None)


def measure(study: Study, jobs: Sequence[Job], deliveries: Sequence[Delivery]) -> Durations:
    """The durations of a study over the jobs of its present revision (else of all) and what came of them."""
    current = [job for job in jobs if job.study_revision == study.revision] or list(jobs)
    is_open = study.state is StudyState.RECEIVING
    ran = [job for job in current if job.started_at is not None and job.finished_at is not None and not _waits(job)]
    longest = max(ran, key=_running_s, default=None)
    is_open = is_open or any(job.untold or _waits(job) or job.state is JobState.RUNNING for job in current)
    is_open = is_open or any(one.state is DeliveryState.PENDING for one in deliveries)
    last_arrival = _longest(one.delivered_at for one in deliveries)
    completed = None if study.state is StudyState.RECEIVING else study.completed_at
    return Durations(
        receiving_s=study.last_received_at - study.first_received_at,
        quiet_s=None if completed is None else max(completed - study.last_received_at, 0.0),
        waiting_s=_longest(job.started_at - job.queued_at for job in current if job.started_at is not None),
        running_s=None if longest is None else _running_s(longest),
        stages_s={} if longest is None else dict(longest.seconds),
        delivering_s=_longest(delivering_s(one) for one in deliveries),
        commitment_s=_longest(commitment_s(one) for one in deliveries),
        total_s=None if is_open or last_arrival is None else max(last_arrival - study.last_received_at, 0.0),
    )


def delivering_s(delivery: Delivery) -> float | None:
    """How long a result took to its peer's Success; None before that."""
    return None if delivery.delivered_at is None else delivery.delivered_at - delivery.created_at


def commitment_s(delivery: Delivery) -> float | None:
    """How long the peer took from its Success to its commitment; None before that."""
    if delivery.committed_at is None or delivery.delivered_at is None:
        return None
    return delivery.committed_at - delivery.delivered_at


def explain_receiving(study: Study, quiet_s: float, now: float) -> str:
    """Why a study is not complete yet."""
    silent_s = max(now - study.last_received_at, 0.0)
    if study.reason:
        return f"{study.reason} (nothing came for {duration(silent_s)})"
    return f"the last of {study.instances} instances came {duration(silent_s)} ago; complete after {duration(quiet_s)}"


def explain_job(job: Job, now: float, pauses: Sequence[Pause] = ()) -> str:
    """Why a job is in its state, who holds it, and what comes next."""
    if job.state is JobState.QUEUED:
        held = [str(pause) for pause in pauses if pause.holds(job)]
        if held:
            return "; ".join(part for part in (*held, job.reason) if part)
        if job.not_before > now:
            return f"{job.reason}; next attempt in {duration(job.not_before - now)}".removeprefix("; ")
        since = duration(now - max(job.queued_at, job.not_before))
        return f"{job.reason}; waits for a worker since {since}".removeprefix("; ")
    if job.state is JobState.RUNNING:
        if job.started_at is None:
            return "its images are read ahead"
        ran = duration(now - job.started_at)
        # host of `node.queue.workers.WorkerId`, the only part of it that people know
        host = (job.lease_owner or "").partition("/")[0]
        return f"attempt {job.attempts} runs since {ran}" + (f" on {host}" if host else "")
    return job.reason


def explain_delivery(delivery: Delivery, now: float) -> str:
    """Why a delivery is in its state, and what comes next."""
    if delivery.state is DeliveryState.PENDING:
        if delivery.not_before > now:
            return f"{delivery.reason}; next attempt in {duration(delivery.not_before - now)}".removeprefix("; ")
        return f"{delivery.reason}; waits to be sent".removeprefix("; ")
    return delivery.reason


def explain_commitment(delivery: Delivery, now: float) -> str:
    """Whether the peer answers for a result, and what comes next; "" where it is not asked."""
    state, reason = delivery.commitment, delivery.commitment_reason
    if state is CommitmentState.NONE:
        return ""
    if (took := commitment_s(delivery)) is not None:
        return f"{state.value} after {duration(took)}"
    parts = [reason] if reason else []
    if delivery.commitment_due_at is not None:
        left = max(delivery.commitment_due_at - now, 0.0)
        parts.append(
            f"asked in {duration(left)}" if state is CommitmentState.DUE else f"asked again in {duration(left)}"
        )
    return f"{state.value}: {'; '.join(parts)}" if parts else state.value


def _waits(job: Job) -> bool:
    return job.state is JobState.QUEUED


def _running_s(job: Job) -> float:
    return (job.finished_at or 0.0) - (job.started_at or 0.0)


def _longest(seconds: Iterable[float | None]) -> float | None:
    return max((one for one in seconds if one is not None), default=None)
