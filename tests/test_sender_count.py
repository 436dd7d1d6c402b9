"""The sender's own count: Orthanc as the sender that is asked, and what the answers of any sender mean."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.events import EVT_C_FIND, Event
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,  # pyright: ignore[reportAttributeAccessIssue]
)
from sqlalchemy import insert, update

from node.archive import schema
from node.archive.records import DeliveryState, JobState, Study, StudyState
from node.archive.store import Archive
from node.assemble import complete_studies
from node.association import Address
from node.config import Config
from node.demo.pacs import Orthanc, free_port
from node.errors import RetrieveError
from node.retrieve import count_instances
from node.sender_count import SenderCounts
from tests.running_node import RunningNode, wait_until

STUDY = "1.2.3"


def receive(archive: Archive, *senders: str, silent_s: float = 5.0) -> Study:
    """A study of which one instance came from each of `senders`, the last one so long ago."""
    last = time.time() - silent_s
    with archive.database.write() as connection:
        study = connection.execute(
            insert(schema.studies).values(
                study_uid=STUDY, state=StudyState.RECEIVING, instances=len(senders),
                first_received_at=last, last_received_at=last,
            )
        ).inserted_primary_key[0]  # fmt: skip
        series = connection.execute(
            insert(schema.series).values(study_id=study, series_uid="1.2.3.4")
        ).inserted_primary_key[0]
        for number, sender in enumerate(senders):
            connection.execute(
                insert(schema.instances).values(
                    series_id=series, sop_instance_uid=f"1.2.3.4.{number}", sop_class_uid="1.2", path=str(number),
                    transfer_syntax_uid="1.2", size=1, sha256="", received_from=sender, received_at=last,
                )
            )  # fmt: skip
    return archive.study(STUDY)


def config_of(tmp_path: Path, *, longest: str = "10m") -> Config:
    peer = {"host": "127.0.0.1", "port": 104}
    return Config.model_validate(
        {
            "node": {"storage": str(tmp_path)},
            "models": {"path": str(tmp_path)},
            "complete": {"longest": longest},
            "peers": {
                "pacs": peer | {"ae_title": "PACS", "query": True},
                "ris": peer | {"ae_title": "RIS", "query": True},
                "mute": peer | {"ae_title": "MUTE"},
            },
        }
    )


@contextmanager
def asking(
    archive: Archive, tmp_path: Path, held: dict[str, Any], longest: str = "10m"
) -> Iterator[tuple[SenderCounts, list[str]]]:
    """Senders that hold so many instances each (an error: that they cannot be asked), and who was asked."""
    asked: list[str] = []

    def count(address: Address, study_uid: str) -> int | None:
        assert study_uid == STUDY
        asked.append(address.ae_title)
        answer = held[address.ae_title]
        if isinstance(answer, Exception):
            raise answer
        return answer

    counts = SenderCounts(archive, config_of(tmp_path, longest=longest), count)
    try:
        yield counts, asked
    finally:
        counts.close()


def settle(counts: SenderCounts, study: Study) -> bool:
    """Whether the study is held back once every question is answered."""
    wait_until(lambda: not counts.holds_back(study) or study.id not in counts._asking, 10, "the senders have answered")
    return counts.holds_back(study)


def deliver_to(archive: Archive, study: Study, peer: str) -> None:
    """One result of ours that the peer holds in this study."""
    with archive.database.write() as connection:
        job = connection.execute(
            insert(schema.jobs).values(
                key="k", study_id=study.id, study_revision=1, route="r", model="m", model_version="1",
                model_digest="d", inputs={}, send_to=[peer], state=JobState.DONE, created_at=0.0,
            )
        ).inserted_primary_key[0]  # fmt: skip
        result = connection.execute(
            insert(schema.results).values(
                job_id=job, kind="seg", path="p", size=1, created_at=0.0, sop_instance_uid="1.9", sop_class_uid="1.2"
            )
        ).inserted_primary_key[0]
        connection.execute(
            insert(schema.deliveries).values(
                result_id=result, peer=peer, state=DeliveryState.DELIVERED, created_at=0.0, delivered_at=1.0
            )
        )


def test_as_many_complete_the_study_at_once(archive: Archive, tmp_path: Path) -> None:
    study = receive(archive, "PACS", "PACS")
    with asking(archive, tmp_path, {"PACS": 2}) as (counts, asked):
        assert counts.all_here() == []  # it is being asked
        wait_until(lambda: bool(counts.all_here()), 10, "the sender has answered")
        assert [one.id for one in counts.all_here()] == [study.id]
        assert asked == ["PACS"]  # once, however often we look
    assert [line.what for line in archive.events(STUDY)] == [
        "pacs has 2 instances, and they are here: complete without waiting"
    ]


def test_more_hold_the_study_back_until_they_come_or_the_longest_time_is_over(archive: Archive, tmp_path: Path) -> None:
    study = receive(archive, "PACS", "PACS", silent_s=50)
    with asking(archive, tmp_path, {"PACS": 412}) as (counts, _):
        assert settle(counts, study)
        assert counts.all_here() == []
        assert archive.study(STUDY).reason == "pacs has 412 instances, 2 are here"
    with asking(archive, tmp_path, {"PACS": 412}, longest="40s") as (counts, _):
        assert not settle(counts, study)
        assert archive.study(STUDY).reason == ""
    assert archive.events(STUDY)[-1].what == (
        "pacs has 412 instances, 2 are here: nothing came for 40 s (complete.longest), complete without the rest"
    )


@pytest.mark.parametrize(
    ("senders", "held"),
    [
        (["PACS"], {"PACS": None}),  # it does not know the study
        (["PACS"], {"PACS": RetrieveError("no answer")}),
        (["PACS"], {"PACS": ZeroDivisionError()}),
        (["MUTE"], {}),  # not to be asked
        (["FOREIGN"], {}),
        (["PACS", "MUTE"], {"PACS": 1}),  # the other may have more
        (["PACS", "RIS"], {"PACS": 1, "RIS": 2}),  # of the other's two one is here, and perhaps both of all
    ],
)
def test_otherwise_the_quiet_period_decides(
    archive: Archive, tmp_path: Path, senders: list[str], held: dict[str, Any]
) -> None:
    study = receive(archive, *senders)
    with asking(archive, tmp_path, held) as (counts, _):
        assert not settle(counts, study)
        assert counts.all_here() == []
    assert archive.events(STUDY) == []
    assert complete_studies(archive, 1.0) == [study]


def test_two_senders_that_have_what_they_sent(archive: Archive, tmp_path: Path) -> None:
    study = receive(archive, "PACS", "RIS")
    with asking(archive, tmp_path, {"PACS": 1, "RIS": 1}) as (counts, _):
        assert not settle(counts, study)
        assert counts.all_here() == [study]


def test_our_own_results_at_the_sender_are_not_waited_for(archive: Archive, tmp_path: Path) -> None:
    study = receive(archive, "PACS", "PACS")
    deliver_to(archive, study, "pacs")
    with asking(archive, tmp_path, {"PACS": 3}) as (counts, _):
        assert not settle(counts, study)
        assert counts.all_here() == []  # it may have hidden the result and hold another image
    with asking(archive, tmp_path, {"PACS": 4}) as (counts, _):
        assert settle(counts, study)


def test_a_new_instance_asks_anew_and_a_slow_sender_holds_up_nobody(archive: Archive, tmp_path: Path) -> None:
    study = receive(archive, "PACS")
    release = threading.Event()

    def count(address: Address, study_uid: str) -> int | None:
        release.wait(10)
        return 1

    counts = SenderCounts(archive, config_of(tmp_path), count)
    try:
        assert counts.holds_back(study)  # while it is asked
        with archive.database.write() as connection:
            connection.execute(update(schema.studies).values(instances=2))
        release.set()
        wait_until(lambda: not counts.holds_back(archive.study(STUDY)), 10, "the sender was asked of what is here now")
        assert len(archive.events(STUDY)) == 1  # the answer of before was none of now
    finally:
        counts.close()


# -- C-FIND ------------------------------------------------------------------------------------------------------------


@contextmanager
def answering(answer: Callable[[Dataset], Iterator[tuple[int, Dataset | None]]]) -> Iterator[Address]:
    """A C-FIND SCP that answers so."""
    address = Address("PACS", "127.0.0.1", free_port(), "RADNODE")

    def find(event: Event) -> Iterator[tuple[int, Dataset | None]]:
        yield from answer(event.identifier)

    ae = AE(ae_title=address.ae_title)
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    server = ae.start_server((address.host, address.port), block=False, evt_handlers=[(EVT_C_FIND, find)])
    assert server is not None
    try:
        yield address
    finally:
        server.shutdown()


def found(query: Dataset, **changes: object) -> tuple[int, Dataset]:
    answer = Dataset()
    answer.QueryRetrieveLevel, answer.StudyInstanceUID = query.QueryRetrieveLevel, query.StudyInstanceUID
    for keyword, value in changes.items():
        setattr(answer, keyword, value)
    return 0xFF00, answer


def by_series(query: Dataset) -> Iterator[tuple[int, Dataset | None]]:
    """A peer that counts series only, and mixes in a study that was not asked for."""
    yield found(query, StudyInstanceUID="9.9", NumberOfStudyRelatedInstances=7, NumberOfSeriesRelatedInstances=7)
    if query.QueryRetrieveLevel == "STUDY":
        yield found(query)
    else:
        yield found(query, SeriesInstanceUID="1.1", NumberOfSeriesRelatedInstances=40)
        yield found(query, SeriesInstanceUID="1.2", NumberOfSeriesRelatedInstances=2)


def by_some_series(query: Dataset) -> Iterator[tuple[int, Dataset | None]]:
    yield found(query, NumberOfSeriesRelatedInstances=None)
    if query.QueryRetrieveLevel == "SERIES":
        yield found(query, NumberOfSeriesRelatedInstances=2)


def endless(query: Dataset) -> Iterator[tuple[int, Dataset | None]]:
    for _ in range(3000):
        yield found(query)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (lambda query: iter([found(query, NumberOfStudyRelatedInstances=42)]), 42),
        (by_series, 42),
        (by_some_series, None),
        (lambda query: iter([]), None),
    ],
)
def test_what_a_peer_answers_is_counted(answer: Any, count: int | None) -> None:
    with answering(answer) as address:
        assert count_instances(address, STUDY) == count


@pytest.mark.parametrize(
    ("answer", "why"), [(lambda query: iter([(0xA700, None)]), "status 0xA700"), (endless, "without end")]
)
def test_a_peer_that_cannot_answer_is_an_error(answer: Any, why: str) -> None:
    with answering(answer) as address, pytest.raises(RetrieveError, match=why):
        count_instances(address, STUDY)


def test_a_peer_that_is_down_is_an_error() -> None:
    with pytest.raises(RetrieveError, match="no DICOM answer"):
        count_instances(Address("PACS", "127.0.0.1", free_port(), "RADNODE"), STUDY)


def test_orthanc_sends_a_part_and_then_the_rest(tmp_path: Path, shared_data: Path) -> None:
    """Through the node's own processes: long quiet periods, and the study waits for nothing but its images."""
    node_port = free_port()
    options = {"DicomModalities": {"radnode": ["RADNODE", "127.0.0.1", node_port]}, "DicomCheckCalledAet": False}
    with Orthanc(tmp_path / "orthanc", options=options) as orthanc:
        files = sorted((shared_data / "chest_ct_siemens").rglob("*.dcm"))
        uid = str(dcmread(files[0], stop_before_pixels=True).StudyInstanceUID)
        for file in files:
            orthanc.rest_bytes("/instances", file.read_bytes())
        identifiers = orthanc.rest("/instances")
        node = RunningNode(tmp_path, orthanc.port, port=node_port, routes="[]", quiet="10m")
        text = node.config.read_text()
        node.config.write_text(text.replace("ae_title: PACS,", "ae_title: PACS, query: true,"))
        node.start()
        try:
            orthanc.rest("/modalities/radnode/store", {"Resources": identifiers[:50], "Synchronous": True})
            wait_until(
                lambda: "has 60 instances, 50 are here" in node.json("studies", "show", uid)["reason"],
                60,
                "the node has asked Orthanc",
            )
            orthanc.rest("/modalities/radnode/store", {"Resources": identifiers[50:], "Synchronous": True})
            shown = node.wait_for(uid, "unwanted", patience_s=60)
            assert shown["durations"]["quiet_s"] < 600
            told = [event["what"] for event in shown["events"]]
            assert told[1:3] == [
                "pacs has 60 instances, 50 are here",
                "pacs has 60 instances, and they are here: complete without waiting",
            ]
        finally:
            node.kill_all()
