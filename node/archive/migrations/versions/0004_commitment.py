"""What peers were asked to answer for, and the times that tell a study's story: completion, and the stages of a run."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """What was delivered before is not asked for: the peer may have let it go since."""
    identifier = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    with op.batch_alter_table("studies") as studies:
        studies.add_column(sa.Column("completed_at", sa.Double()))
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("seconds", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("deliveries") as deliveries:
        deliveries.add_column(sa.Column("commitment", sa.String(16), nullable=False, server_default="none"))
        deliveries.add_column(sa.Column("commitment_reason", sa.Text(), nullable=False, server_default=""))
        deliveries.add_column(sa.Column("commitment_due_at", sa.Double()))
        deliveries.add_column(sa.Column("commitment_asks", sa.Integer(), nullable=False, server_default="0"))
        deliveries.add_column(sa.Column("commitment_refusals", sa.Integer(), nullable=False, server_default="0"))
        deliveries.add_column(sa.Column("transaction_uid", sa.String(64)))
        deliveries.add_column(sa.Column("committed_at", sa.Double()))
        deliveries.create_index("deliveries_uncommitted", ["peer", "commitment_due_at"])
    op.create_table(
        "commitment_requests",
        sa.Column("id", identifier, primary_key=True),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("transaction_uid", sa.String(64), nullable=False, unique=True),
        sa.Column("references", sa.JSON(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
    )
    op.create_index("commitment_requests_by_age", "commitment_requests", ["peer", "asked_at"])
