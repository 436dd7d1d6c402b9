"""In which order jobs run and until when, what a person holds, and when a series was last received."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Jobs of before are routine work without a deadline; those that wait keep their age and learn their source."""
    with op.batch_alter_table("series") as series:
        series.add_column(sa.Column("last_received_at", sa.Double(), nullable=False, server_default="0"))
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("priority", sa.String(16), nullable=False, server_default="routine"))
        jobs.add_column(sa.Column("source", sa.Text(), nullable=False, server_default=""))
        jobs.add_column(sa.Column("lane", sa.Text(), nullable=False, server_default=""))
        jobs.add_column(sa.Column("deadline_s", sa.Double()))
        jobs.add_column(sa.Column("queued_at", sa.Double(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("deadline_at", sa.Double()))
        jobs.drop_index("jobs_by_state")
        jobs.create_index("jobs_waiting", ["state", "lane", "queued_at", "id"])
        jobs.create_index("jobs_by_source", ["source", "started_at"])
        jobs.create_index("jobs_by_start", ["started_at"])
        jobs.create_index("jobs_by_deadline", ["state", "deadline_at"])
    op.create_table(
        "pauses",
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("reason", sa.Text(), nullable=False, server_default=""),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
    )
    op.execute(
        "UPDATE series SET last_received_at = "
        "(SELECT studies.last_received_at FROM studies WHERE studies.id = series.study_id)"
    )
    op.execute(
        "UPDATE jobs SET source = COALESCE((SELECT instances.received_from FROM instances "
        "JOIN series ON series.id = instances.series_id WHERE series.study_id = jobs.study_id "
        "ORDER BY instances.id LIMIT 1), '') WHERE state IN ('queued', 'running')"
    )
    op.execute(r"UPDATE jobs SET queued_at = created_at, lane = source || '\' || model || '\' || priority")
