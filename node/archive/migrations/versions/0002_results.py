"""Which kinds of results a job makes, whether its peers hear that there is none, and what peers accept."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Jobs of before made SEG and SR, and told nobody when there was no result: so they stay."""
    identifier = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("results", sa.JSON(), nullable=False, server_default='["seg", "sr"]'))
        jobs.add_column(sa.Column("tell_no_result", sa.Boolean(), nullable=False, server_default=sa.true()))
        jobs.add_column(sa.Column("untold", sa.Boolean(), nullable=False, server_default=sa.false()))
        jobs.create_index("jobs_untold", ["untold", "finished_at"])
    op.create_table(
        "peer_storage",
        sa.Column("id", identifier, primary_key=True),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("sop_class_uid", sa.String(64), nullable=False),
        sa.Column("transfer_syntaxes", sa.JSON(), nullable=False),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.UniqueConstraint("peer", "sop_class_uid"),
    )
    op.drop_table("schema_version")
