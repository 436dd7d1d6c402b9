"""The tables of the first version, which numbered itself."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing to do: a database at this step exists already."""
