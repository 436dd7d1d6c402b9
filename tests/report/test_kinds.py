"""What is to be made so that every destination gets what it takes, and nothing that nobody gets."""

from __future__ import annotations

from node.report.house import House
from node.report.kinds import Kind, SegForm, Takes, Wanted, all_of

EVERYTHING = tuple(Kind)
PICTURES = (Kind.SUMMARY, Kind.OVERLAY)


def test_no_form_is_made_for_a_peer_that_takes_pictures_only() -> None:
    takes = [Takes(EVERYTHING, SegForm.LABELMAP), Takes(PICTURES, SegForm.BINARY)]
    assert all_of(takes, EVERYTHING) == Wanted(list(EVERYTHING), (SegForm.LABELMAP,))


def test_a_peer_that_takes_the_report_alone_needs_the_form_that_it_refers_to() -> None:
    takes = [Takes((Kind.SEG,), SegForm.LABELMAP), Takes((Kind.SR,), SegForm.BINARY)]
    assert all_of(takes, [Kind.SEG, Kind.SR]).forms == (SegForm.LABELMAP, SegForm.BINARY)


def test_what_the_route_does_not_make_asks_for_no_form() -> None:
    takes = [Takes(EVERYTHING, SegForm.LABELMAP), Takes(EVERYTHING, SegForm.FRACTIONAL)]
    assert all_of(takes, PICTURES) == Wanted(list(PICTURES), (SegForm.BINARY,))


def test_a_version_that_is_not_known_leaves_no_gap() -> None:
    house = House(series_description="KI {model} {version} {kind}")
    assert house.describe(model="lungs", version="", title="Lungs", kind="sr") == "KI lungs sr"
    assert house.describe(model="lungs", version="1.2", title="Lungs", kind="sr") == "KI lungs 1.2 sr"
