"""The sender's own count: whether the peers that sent a study have more of it than is here.

Peers are asked in a few threads, so that one that is slow holds up no other study. What they said is kept in memory
only: after a restart they are asked again. What they say decides in three ways: as many as are here, complete at once;
more, not complete yet; anything else, the quiet period decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

from sqlalchemy import func, select, update

from node.archive import schema
from node.archive.database import record_event
from node.archive.records import DeliveryState, Study, StudyState
from node.archive.store import Archive
from node.association import Address
from node.config import Config
from node.errors import RetrieveError
from node.retrieve import count_instances

_log = logging.getLogger(__name__)

ASK_AFTER_S = 1.0  # nothing arrived for so long: the sender may be through
ASK_AGAIN_S = 10.0  # a sender that has more
LEAVE_ALONE_S = 60.0  # a peer that could not be asked
_THREADS = 4
_MOST_WAITING = 64  # studies; of more the quiet period decides


class Answer(Enum):
    """What the senders of a study say together."""

    ALL_HERE = auto()  # every sender has as many as it sent
    MORE = auto()  # one of them has more than are here
    UNKNOWN = auto()  # none of this can be said


@dataclass(frozen=True)
class Said:
    """An answer for a study as it was then."""

    answer: Answer
    sentence: str  # for people; "" for UNKNOWN
    of: tuple[int, int]  # revision and number of instances
    at: float  # monotonic


class SenderCounts:
    """Asks senders, and keeps what they said as long as their studies are being received."""

    def __init__(
        self,
        archive: Archive,
        config: Config,
        count: Callable[[Address, str], int | None] = count_instances,
    ):
        self._archive = archive
        self._longest_s = config.complete.longest_s
        self._count = count
        self._peers = _askable(config)
        self._said: dict[int, Said] = {}
        self._asking: dict[int, tuple[tuple[int, int], Future[tuple[Answer, str]]]] = {}
        self._silent_until: dict[str, float] = {}  # peer to when it may be asked again
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sender-count")

    def close(self) -> None:
        """Ask nobody more; a question that is out ends by its timeouts."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def all_here(self) -> list[Study]:
        """Studies still within their quiet period of which every sender has no more than it sent; asks for the rest."""
        if not self._peers:
            return []
        receiving = self._archive.receiving()
        known = {study.id for study in receiving}
        self._said = {study_id: said for study_id, said in self._said.items() if study_id in known}
        paused = [study for study in receiving if study.last_received_at <= time.time() - ASK_AFTER_S]
        return [study for study in paused if self._hear(study) is Answer.ALL_HERE]

    def holds_back(self, study: Study) -> bool:
        """Whether a study whose quiet period has passed must wait, as a sender has more or is just being asked."""
        if not self._peers:
            return False
        answer = self._hear(study)
        if answer is None:
            return study.id in self._asking
        if answer is not Answer.MORE:
            return False
        if time.time() - study.last_received_at < self._longest_s:
            return True
        rest = f"nothing came for {self._longest_s:.0f} s (complete.longest), complete without the rest"
        self._note(study, "", f"{self._said[study.id].sentence}: {rest}")
        return False

    def _hear(self, study: Study) -> Answer | None:
        """What the senders say of the study as it is now; None when that is not known yet. Asks where needed."""
        now, key = time.monotonic(), (study.revision, study.instances)
        if study.id in self._asking:
            asked, future = self._asking[study.id]
            if not future.done():
                return None
            del self._asking[study.id]
            answer, sentence = future.result()
            first = study.id not in self._said or self._said[study.id].answer is not answer
            self._said[study.id] = Said(answer, sentence, asked, now)
            if asked == key:
                self._tell(study, answer, sentence, first=first)
        said = self._said.get(study.id)
        if said is not None and said.of == key and (said.answer is not Answer.MORE or now < said.at + ASK_AGAIN_S):
            return said.answer
        if len(self._asking) < _MOST_WAITING:
            self._asking[study.id] = key, self._pool.submit(self._ask, study)
        # A sender that has more is believed until it is heard again.
        return said.answer if said is not None and said.of == key else None

    def _tell(self, study: Study, answer: Answer, sentence: str, *, first: bool) -> None:
        if answer is Answer.ALL_HERE:
            self._note(study, "", f"{sentence}: complete without waiting")
        elif answer is Answer.MORE:
            self._note(study, sentence, sentence if first else "")
        elif study.reason:
            self._note(study, "", "")

    def _note(self, study: Study, reason: str, event: str) -> None:
        columns = schema.studies.c
        with self._archive.database.write() as connection:
            connection.execute(
                update(schema.studies)
                .where(columns.id == study.id, columns.state == StudyState.RECEIVING)
                .values(reason=reason)
            )
            if event:
                record_event(connection, "schedule", study.study_uid, event)

    # -- in the threads ------------------------------------------------------------------------------------------------

    def _ask(self, study: Study) -> tuple[Answer, str]:
        try:
            return self._compare(study)
        except Exception as error:  # the thread's outermost frame: the quiet period decides
            _log.error("study %s: its senders could not be asked: %s", study.study_uid, type(error).__name__)
            return Answer.UNKNOWN, ""

    def _compare(self, study: Study) -> tuple[Answer, str]:
        senders = self._senders(study)
        sentences, is_certain = [], True
        for ae_title, sent in senders.items():
            name, address = self._peers.get(ae_title, ("", None))
            count = None if address is None else self._ask_peer(name, address, study.study_uid)
            if count is None:
                is_certain = False
                continue
            ours = self._delivered(study, name)
            count -= ours
            if count > study.instances:
                return Answer.MORE, f"{name} has {count} instances, {study.instances} are here"
            # Of our own results the peer may have hidden some: then the count proves nothing.
            is_certain = is_certain and ours == 0 and count <= sent
            sentences.append(f"{name} has {count} instances, and they are here")
        return (Answer.ALL_HERE, "; ".join(sentences)) if is_certain and sentences else (Answer.UNKNOWN, "")

    def _ask_peer(self, name: str, address: Address, study_uid: str) -> int | None:
        if time.monotonic() < self._silent_until.get(name, 0.0):
            return None
        try:
            return self._count(address, study_uid)
        except RetrieveError as error:
            _log.warning("%s could not be asked for its count: %s", name, error)
            self._silent_until[name] = time.monotonic() + LEAVE_ALONE_S
            return None

    def _senders(self, study: Study) -> dict[str, int]:
        """Calling AE title to how many instances of the study came from it."""
        columns = schema.instances.c
        query = (
            select(columns.received_from, func.count())
            .select_from(schema.instances.join(schema.series))
            .where(schema.series.c.study_id == study.id)
            .group_by(columns.received_from)
        )
        with self._archive.database.read() as connection:
            return {str(sender): int(count) for sender, count in connection.execute(query)}

    def _delivered(self, study: Study, peer: str) -> int:
        """How many results of ours the peer holds in this study."""
        query = (
            select(func.count())
            .select_from(schema.deliveries.join(schema.results).join(schema.jobs))
            .where(
                schema.jobs.c.study_id == study.id,
                schema.deliveries.c.peer == peer,
                schema.deliveries.c.state == DeliveryState.DELIVERED,
            )
        )
        with self._archive.database.read() as connection:
            return int(connection.scalar(query) or 0)


def _askable(config: Config) -> Mapping[str, tuple[str, Address]]:
    """AE title to name and address of the peers that can be asked; of two with one title neither is known."""
    titles = [peer.ae_title for peer in config.peers.values()]
    return {
        peer.ae_title: (name, Address(peer.ae_title, peer.host, peer.port, config.node.ae_title))
        for name, peer in config.peers.items()
        if peer.query and peer.port is not None and titles.count(peer.ae_title) == 1
    }
