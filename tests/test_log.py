"""The log: where an unexpected error happened, and nothing that it quotes of a patient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from io import BytesIO

import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from node.errors import OutputRefused, RadnodeError
from node.log import Line

NAME = "DOE^JANE"


def write_badly() -> None:
    """pydicom, which quotes the value of an element that it cannot write."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    element = DataElement("PatientName", "US", 1)
    element._value = NAME
    dataset.add(element)
    dataset.save_as(BytesIO())


def convert_badly() -> None:
    int(NAME)


def look_up_badly() -> None:
    {}[NAME]


def raise_of_such() -> None:
    try:
        write_badly()
    except Exception as error:
        raise RuntimeError(str(error)) from error


def format_error(function: Callable[[], None]) -> tuple[str, str]:
    """What the error says itself, and what the log says of it."""
    try:
        function()
    except Exception as error:
        record = logging.LogRecord("node", logging.ERROR, "", 0, "job 7", (), (type(error), error, error.__traceback__))
        return str(error), Line().format(record)
    raise AssertionError("no error")


@pytest.mark.parametrize("function", [write_badly, convert_badly, look_up_badly, raise_of_such])
def test_what_an_error_quotes_is_not_logged(function: Callable[[], None]) -> None:
    said, logged = format_error(function)
    assert NAME in said
    assert NAME not in logged
    assert f"in {function.__name__}" in logged
    assert "job 7\nTraceback (most recent call last):\n" in logged


def refuse() -> None:
    try:
        convert_badly()
    except ValueError as error:
        raise OutputRefused("segment 3 is on no slice of 1.2.3") from error


def compare_shapes() -> None:
    raise ValueError("operands could not be broadcast together with shapes (2,) (3,)")


def test_what_is_of_the_program_is_logged() -> None:
    _, logged = format_error(refuse)
    assert logged.endswith("OutputRefused: segment 3 is on no slice of 1.2.3")
    assert "ValueError: invalid literal for int() with base 10: '...'" in logged
    assert issubclass(OutputRefused, RadnodeError)
    assert format_error(compare_shapes)[1].endswith("broadcast together with shapes (2,) (3,)")


def test_the_journal_gets_a_priority_on_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    lines = format_error(convert_badly)[1].splitlines()
    assert lines[0] == "<3>job 7"
    assert all(line.startswith("<3>") for line in lines)
