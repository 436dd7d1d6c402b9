"""The tables of the archive, one schema for SQLite and PostgreSQL.

Times are Unix seconds, UTC. A row of `instances` exists only for a file that has its final name, and is durable there
(unless it was received with `durability: relaxed`); a row of `jobs` says all that a worker needs; `events` is the story
of a study, one line per transition, written in the same transaction.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    true,
)

REVISION = "0004"  # of the newest file in `migrations/versions`

metadata = MetaData()

# SQLite makes a rowid alias only of INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")

# As alembic keeps it: which migration the tables are at.
alembic_version = Table("alembic_version", metadata, Column("version_num", String(32), primary_key=True))

studies = Table(
    "studies",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("study_uid", String(64), nullable=False, unique=True),
    Column("patient_id", Text, nullable=False, default=""),
    Column("accession_number", Text, nullable=False, default=""),
    Column("study_date", String(8), nullable=False, default=""),
    Column("description", Text, nullable=False, default=""),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),  # why it is in this state, one sentence
    Column("revision", Integer, nullable=False, default=1),  # counts how often late instances reopened it
    Column("instances", Integer, nullable=False, default=0),
    Column("first_received_at", Double, nullable=False),
    Column("last_received_at", Double, nullable=False),
    Column("completed_at", Double),  # when this revision was last routed as a whole
    Index("studies_by_state", "state", "last_received_at"),
)

series = Table(
    "series",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("study_id", _Id, ForeignKey("studies.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("series_uid", String(64), nullable=False),
    Column("modality", String(16), nullable=False, default=""),
    Column("description", Text, nullable=False, default=""),
    Column("instances", Integer, nullable=False, default=0),
    Column("last_received_at", Double, nullable=False, server_default="0"),
    UniqueConstraint("study_id", "series_uid"),
)

instances = Table(
    "instances",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("series_id", _Id, ForeignKey("series.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("sop_instance_uid", String(64), nullable=False, unique=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("transfer_syntax_uid", String(64), nullable=False),
    Column("path", Text, nullable=False),  # relative to the storage folder
    Column("size", BigInteger, nullable=False),  # bytes of the file
    Column("sha256", String(64), nullable=False),  # of the data set as it was received
    Column("received_from", Text, nullable=False),  # calling AE title
    Column("received_at", Double, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),  # see node.queue.job_key
    Column("study_id", _Id, ForeignKey("studies.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("study_revision", Integer, nullable=False),
    Column("route", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("model_digest", String(64), nullable=False),
    Column("inputs", JSON, nullable=False),  # manifest input name to sorted instances (`node.dicom.naming`)
    Column("send_to", JSON, nullable=False),  # peer names
    Column("results", JSON, nullable=False, server_default='["seg", "sr"]'),  # kinds, see node.report.kinds
    Column("tell_no_result", Boolean, nullable=False, server_default=true()),  # whether the peers hear of a failure
    Column("untold", Boolean, nullable=False, server_default=false()),  # ended without a result; the peers must hear
    Column("priority", String(16), nullable=False, server_default="routine"),  # see node.priority
    Column("source", Text, nullable=False, server_default=""),  # calling AE title that sent the study
    Column("lane", Text, nullable=False, server_default=""),  # source, model and priority, see node.queue.order
    Column("deadline_s", Double),  # its route's deadline in seconds; None: it may take any time
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("measurements", JSON, nullable=False, default=list),  # rows for people; the SR is the record
    Column("seconds", JSON, nullable=False, server_default="{}"),  # stage of the last run to how long it took
    Column("attempts", Integer, nullable=False, default=0),  # counted before each attempt starts
    Column("lease_owner", Text),  # who runs it, see node.queue.WorkerId
    Column("lease_until", Double),
    Column("not_before", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
    Column("queued_at", Double, nullable=False, server_default="0"),  # made, or queued again by a person or a route
    Column("deadline_at", Double),  # `deadline_s` after `queued_at`
    Column("started_at", Double),  # of its last attempt
    Column("finished_at", Double),
    # The next of a lane, and which lanes there are, without reading the others (`node.queue.order`).
    Index("jobs_waiting", "state", "lane", "queued_at", "id"),
    Index("jobs_by_source", "source", "started_at"),
    Index("jobs_by_start", "started_at"),
    Index("jobs_by_deadline", "state", "deadline_at"),
    Index("jobs_untold", "untold", "finished_at"),
)

results = Table(
    "results",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", _Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("kind", String(16), nullable=False),  # seg, sr and so on: the name of its file
    Column("sop_instance_uid", String(64), nullable=False, unique=True),
    Column("sop_class_uid", String(64), nullable=False),
    Column("path", Text, nullable=False),  # relative to the storage folder
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("result_id", _Id, ForeignKey("results.id", ondelete="CASCADE"), nullable=False),
    Column("peer", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
    Column("delivered_at", Double),
    Column("commitment", String(16), nullable=False, default="none", server_default="none"),
    Column("commitment_reason", Text, nullable=False, default="", server_default=""),
    Column("commitment_due_at", Double),  # when the peer is asked (again); None: nothing is to be done
    Column("commitment_asks", Integer, nullable=False, default=0, server_default="0"),  # that the peer took
    Column("commitment_refusals", Integer, nullable=False, default=0, server_default="0"),
    Column("transaction_uid", String(64)),  # of the last of them
    Column("committed_at", Double),
    UniqueConstraint("result_id", "peer"),
    Index("deliveries_by_state", "peer", "state", "not_before"),
    Index("deliveries_uncommitted", "peer", "commitment_due_at"),
)

# What a person holds: jobs of a model, or workers, start nothing new while a row stands here.
pauses = Table(
    "pauses",
    metadata,
    Column("kind", String(16), primary_key=True),  # model, workers
    Column("name", String(255), primary_key=True),  # of the model; of the workers' host, empty for every host
    Column("reason", Text, nullable=False, server_default=""),  # of the person who did it
    Column("actor", Text, nullable=False),
    Column("since", Double, nullable=False),
)

# What a peer accepted when it was asked, object class by object class.
peer_storage = Table(
    "peer_storage",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("peer", Text, nullable=False),
    Column("sop_class_uid", String(64), nullable=False),
    Column("transfer_syntaxes", JSON, nullable=False),  # UIDs; none: not this class
    Column("asked_at", Double, nullable=False),
    UniqueConstraint("peer", "sop_class_uid"),
)

commitments = Table(
    "commitments",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("peer", Text, nullable=False),  # its name in the configuration
    Column("transaction_uid", String(64), nullable=False),
    Column("references", JSON, nullable=False),  # pairs of SOP class and instance UID
    Column("reason", Text, nullable=False, default=""),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
    Column("told_at", Double),  # None: the peer is owed a report
    UniqueConstraint("peer", "transaction_uid"),
    Index("commitments_owed", "peer", "told_at", "not_before"),
)

# What we asked peers to answer for: kept as long as an answer may come (see node.archive.asked_commitments).
commitment_requests = Table(
    "commitment_requests",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("peer", Text, nullable=False),  # its name in the configuration
    Column("transaction_uid", String(64), nullable=False, unique=True),
    Column("references", JSON, nullable=False),  # delivery, SOP class UID, SOP instance UID of each
    Column("asked_at", Double, nullable=False),
    Index("commitment_requests_by_age", "peer", "asked_at"),
)

# How far `node.archive.recover` has compared rows with files: one row.
recovery = Table(
    "recovery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("checked_instance_id", BigInteger, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", Double, nullable=False),
    Column("actor", Text, nullable=False),  # the stage or command that did it
    Column("study_uid", String(64), nullable=False, default="", index=True),
    Column("what", Text, nullable=False),  # one sentence, no patient data
)
