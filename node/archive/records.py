"""The rows of the archive as typed values: states as enums, records frozen, `from_row` the only door from the
database.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, Self

from sqlalchemy import Row

from node.priority import Priority


class StudyState(StrEnum):
    """Where a study stands on its way in."""

    RECEIVING = "receiving"  # instances may still come: the quiet period has not passed
    ROUTED = "routed"  # complete; at least one route wanted it and made its jobs
    UNWANTED = "unwanted"  # complete and kept; no route wanted it, the reason says why
    QUARANTINED = "quarantined"  # contradictory content (two patients): nothing is run on it


class JobState(StrEnum):
    """Where one model run stands."""

    QUEUED = "queued"  # waits for a worker, or for its next attempt
    RUNNING = "running"  # leased by a worker
    DONE = "done"  # its results are in the archive
    REFUSED = "refused"  # the model is not applicable; the reason says why
    FAILED = "failed"  # it cannot succeed as it is (package changed, output is no result)
    QUARANTINED = "quarantined"  # every allowed attempt failed or killed its worker
    CANCELLED = "cancelled"  # a person said so
    WITHDRAWN = "withdrawn"  # a person took its results back; the peers that had them were told


class DeliveryState(StrEnum):
    """Where one result stands on its way to one peer."""

    PENDING = "pending"  # to be sent, at once or after `not_before`
    DELIVERED = "delivered"  # the peer answered Success (or a warning)
    FAILED = "failed"  # the peer says that it never takes this object; `deliveries retry` tries again
    WITHDRAWN = "withdrawn"  # never sent: the result was taken back before, or a person gave the delivery up


class CommitmentState(StrEnum):
    """Whether a peer has taken responsibility for a delivered result (storage commitment, PS3.4 J)."""

    NONE = "none"  # the peer is not asked, or the result is not delivered yet
    DUE = "due"  # the peer is to be asked
    ASKED = "asked"  # it was asked; its report is awaited
    OVERDUE = "overdue"  # its report did not come in time; it is asked again, until that was often enough
    COMMITTED = "committed"  # it answers for the result
    REFUSED = "refused"  # it does not, although the result was sent again


class Record:
    """A frozen dataclass whose fields are columns; `_enums` names those that are states."""

    _enums: ClassVar[dict[str, type[StrEnum]]] = {}

    @classmethod
    def from_row(cls, row: Row[Any]) -> Self:
        """The record of a row that holds (at least) the record's columns."""
        columns = row._mapping
        values = {field.name: columns[field.name] for field in fields(cls)}  # pyright: ignore[reportArgumentType]
        for name, enum in cls._enums.items():
            values[name] = enum(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Study(Record):
    """One study as it lies in the archive."""

    _enums: ClassVar[dict[str, type[StrEnum]]] = {"state": StudyState}

    id: int
    study_uid: str
    patient_id: str
    accession_number: str
    study_date: str
    description: str
    state: StudyState
    reason: str
    revision: int
    instances: int
    first_received_at: float
    last_received_at: float
    completed_at: float | None


@dataclass(frozen=True)
class Series(Record):
    """One series of a study."""

    id: int
    study_id: int
    series_uid: str
    modality: str
    description: str
    instances: int
    last_received_at: float


@dataclass(frozen=True)
class Instance(Record):
    """One instance and its file."""

    id: int
    series_id: int
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: str  # relative to the storage folder
    size: int
    sha256: str
    received_from: str
    received_at: float


@dataclass(frozen=True)
class Job(Record):
    """One model run on one set of series."""

    _enums: ClassVar[dict[str, type[StrEnum]]] = {"state": JobState, "priority": Priority}

    id: int
    key: str
    study_id: int
    study_revision: int
    route: str
    model: str
    model_version: str
    model_digest: str
    inputs: dict[str, list[str]]
    send_to: list[str]
    results: list[str]
    tell_no_result: bool
    untold: bool
    priority: Priority
    source: str  # calling AE title that sent the study
    deadline_s: float | None
    state: JobState
    reason: str
    measurements: list[dict[str, Any]]
    seconds: dict[str, float]
    attempts: int
    lease_owner: str | None
    lease_until: float | None
    not_before: float
    created_at: float
    queued_at: float  # made, or queued again by a person or a route
    deadline_at: float | None
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True)
class StoredResult(Record):
    """One DICOM object that a job made."""

    id: int
    job_id: int
    kind: str
    sop_instance_uid: str
    sop_class_uid: str
    path: str  # relative to the storage folder
    size: int
    created_at: float


@dataclass(frozen=True)
class Delivery(Record):
    """One result on its way to one peer."""

    _enums: ClassVar[dict[str, type[StrEnum]]] = {"state": DeliveryState, "commitment": CommitmentState}

    id: int
    result_id: int
    peer: str
    state: DeliveryState
    reason: str
    attempts: int
    not_before: float
    created_at: float
    delivered_at: float | None
    commitment: CommitmentState
    commitment_reason: str
    commitment_due_at: float | None
    commitment_asks: int
    commitment_refusals: int
    transaction_uid: str | None
    committed_at: float | None
