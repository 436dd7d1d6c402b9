"""What is made of kept results: files that are gone or damaged are told, and quoted nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.archive.store import Archive
from node.config import load_config
from node.deliver import outbox
from node.errors import InputRefused
from node.outcome import withdraw_job
from node.report.rejection import RejectionReason
from tests.deliver.test_outbox import owe

# Of file meta information whose length is two bytes, of which pydicom raises what is neither an OSError nor a
# ValueError, with the bytes.
DAMAGED = bytes(128) + b"DICM\2\0\0\0UL\4\0\0\0"


@pytest.mark.parametrize("content", [None, b"no DICOM", DAMAGED], ids=["gone", "no DICOM", "damaged"])
def test_results_that_cannot_be_read_are_not_withdrawn(
    archive: Archive, tmp_path: Path, shared_data: Path, content: bytes | None
) -> None:
    (tmp_path / "config.yaml").write_text("node: {storage: var}\nmodels: {path: models}\n")
    owe(archive, sorted((shared_data / "chest_ct_philips").glob("*.dcm"))[:1], "pacs")
    (parcel,) = outbox.list_parcels(archive.database)
    outbox.mark_delivered(archive.database, parcel)
    file = archive.storage / parcel.path
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    config = load_config(tmp_path / "config.yaml")
    with pytest.raises(InputRefused, match="job 1 are no longer readable: withdraw them at the PACS"):
        withdraw_job(archive, config, 1, RejectionReason.QUALITY, "", "test")
