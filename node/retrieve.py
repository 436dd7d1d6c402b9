"""Asking a peer what it holds (C-FIND, PS3.4 C.4.1): how many instances it has of a study."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pydicom.dataset import Dataset
from pynetdicom.association import Association
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,  # pyright: ignore[reportAttributeAccessIssue]
)

from node.association import LITTLE_ENDIAN, Address, Connection
from node.errors import DeliveryError, RetrieveError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0  # for each answer
IN_ALL_S = 30.0
_MOST_ANSWERS = 2000  # series of a study; more is no answer
_PENDING = (0xFF00, 0xFF01)


def count_instances(address: Address, study_uid: str) -> int | None:
    """How many instances of a study the peer says that it holds; None when it does not know the study or the number.

    At the level of studies by Number of Study Related Instances (0020,1208); where that is empty, the sum of the
    series' (0020,1209). `RetrieveError` when the peer cannot be asked.
    """
    try:
        with Connection(
            address,
            [(StudyRootQueryRetrieveInformationModelFind, LITTLE_ENDIAN)],
            connect_timeout_s=CONNECT_TIMEOUT_S,
            answer_timeout_s=ANSWER_TIMEOUT_S,
        ) as association:
            until = time.monotonic() + IN_ALL_S
            studies = list(_find(association, address, _query("STUDY", study_uid), until))
            if not studies:
                return None
            number = _number(studies[0], "NumberOfStudyRelatedInstances")
            if number is not None:
                return number
            numbers = [
                _number(series, "NumberOfSeriesRelatedInstances")
                for series in _find(association, address, _query("SERIES", study_uid), until)
            ]
    except DeliveryError as error:
        raise RetrieveError(str(error)) from error
    known = [number for number in numbers if number is not None]
    return sum(known) if known and len(known) == len(numbers) else None


def _query(level: str, study_uid: str) -> Dataset:
    query = Dataset()
    query.QueryRetrieveLevel = level
    query.StudyInstanceUID = study_uid
    if level == "STUDY":
        query.NumberOfStudyRelatedInstances = None
    else:
        query.SeriesInstanceUID = ""
        query.NumberOfSeriesRelatedInstances = None
    return query


def _find(association: Association, address: Address, query: Dataset, until: float) -> Iterator[Dataset]:
    """The answers that are of the study that was asked for; a peer may answer more than that."""
    try:
        answers = association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind)
        for count, (status, found) in enumerate(answers):
            code = status.get("Status")
            if code is None:
                raise RetrieveError(f"{address} broke off or did not answer C-FIND within {ANSWER_TIMEOUT_S:.0f} s")
            if code not in _PENDING:
                if code != 0x0000:
                    raise RetrieveError(f"{address} answered C-FIND with status 0x{code:04X}")
                return
            if count >= _MOST_ANSWERS or time.monotonic() > until:
                association.abort()
                raise RetrieveError(f"{address} answered C-FIND for one study without end")
            if found is not None and str(found.get("StudyInstanceUID", "")) == query.StudyInstanceUID:
                yield found
    except (RuntimeError, ValueError) as error:
        raise RetrieveError(f"could not ask {address}: {error}") from error


def _number(answer: Dataset, keyword: str) -> int | None:
    """A count in an answer; None for none, or for what is no count."""
    try:
        value = answer.get(keyword)
        number = int(value) if value not in (None, "") else -1
    except (TypeError, ValueError):
        return None
    return number if number >= 0 else None
