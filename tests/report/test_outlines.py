"""Outlines: what they enclose is the mask, to the pixel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from node.infer.results import Boxes, Landmark, Landmarks, Scores
from node.report import outlines
from node.report.findings import measure
from node.report.outlines import MOST_KEY_SLICES, Polygon, area, bound, simplify, trace, trace_labels
from node.report.scores import ScoreFindings
from node.report.segments import SegmentFindings
from node.report.words import show_number
from tests.report.cases import FIRST, SECOND
from tests.report.conftest import CaseOf
from tests.report.predictions import DENSITY, LANDMARKS, classify_breast, detect, make_subject, mark_head, read_planar

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def fill(polygons: tuple[Polygon, ...], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres lie within an odd number of polygons, by another's rasteriser."""
    filled = np.zeros(shape, bool)
    for polygon in polygons:
        filled ^= polygon2mask(shape, polygon[:, ::-1])
    return filled


def furthest(points: Polygon, ring: Polygon) -> float:
    """How far the furthest of the points lies from the closed line."""
    ends = np.roll(ring, -1, axis=0)
    along = ends - ring
    parts = np.clip(((points[:, None] - ring) * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return float(np.linalg.norm(points[:, None] - (ring + parts[..., None] * along), axis=-1).min(axis=1).max())


@given(masks)
@settings(max_examples=200)
def test_filled_outlines_are_the_mask(mask: NDArray[np.bool_]) -> None:
    polygons = tuple(trace(mask))
    assert np.array_equal(fill(polygons, mask.shape), mask)
    assert sum(area(polygon) for polygon in polygons) == mask.sum()
    for polygon in polygons:
        steps = np.abs(np.diff(np.vstack([polygon, polygon[:2]]), axis=0)) > 0
        assert (steps.sum(axis=1) == 1).all()  # along pixel edges
        assert (steps[:-1] != steps[1:]).all()  # corners only
        assert (polygon == np.floor(polygon) + 0.5).all()


@given(arrays(np.uint16, (7, 9), elements=st.integers(0, 3)))
def test_every_label_has_its_own_outline(labels: NDArray[np.uint16]) -> None:
    found = dict(trace_labels(labels))
    assert set(found) == set(np.unique(labels)) - {0}
    for label, polygons in found.items():
        assert np.array_equal(fill(polygons, labels.shape), labels == label)


def test_a_hole_runs_the_other_way() -> None:
    mask = np.ones((5, 6), bool)
    mask[2, 2:4] = False
    outer, hole = trace(mask)
    assert outer.tolist() == [[-0.5, -0.5], [5.5, -0.5], [5.5, 4.5], [-0.5, 4.5]]
    assert (area(outer), area(hole)) == (30, -2)


def test_pixels_that_touch_at_a_corner_are_apart() -> None:
    assert [len(polygon) for polygon in trace(np.eye(3, dtype=bool))] == [4, 4, 4]
    (ring, inner) = trace(~np.eye(3, dtype=bool) & (np.indices((3, 3)).sum(axis=0) != 9))
    assert (area(ring), area(inner)) == (3, 3)


@given(arrays(bool, (24, 24), elements=st.booleans()), st.floats(0.3, 3))
@settings(max_examples=60)
def test_a_simpler_outline_stays_near(noise: NDArray[np.bool_], tolerance: float) -> None:
    for mask in (noise, np.kron(noise[:6, :6], np.ones((4, 4), bool))):
        for polygon in trace(mask):
            simpler = simplify(polygon, tolerance)
            assert set(map(tuple, simpler.tolist())) <= set(map(tuple, polygon.tolist()))
            assert furthest(polygon, simpler) <= 1.05 * tolerance


def test_a_circle_needs_few_corners() -> None:
    y, x = np.ogrid[:256, :256]
    (circle,) = trace((x - 128.3) ** 2 + (y - 127.8) ** 2 < 100**2)
    assert len(simplify(circle, 1.0)) < len(circle) / 5


def test_too_many_outlines_are_bounded_and_said(case_of: CaseOf, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case_of("siemens_ct").analysis.findings.outlines()
    assert bound(whole) == (whole, "")
    monkeypatch.setattr(outlines, "MOST_POINTS", 50)
    monkeypatch.setattr(outlines, "MOST_POLYGONS", 3)
    kept, remark = bound(whole)
    assert remark == "only the 3 largest outlines; outlines within 1 pixel"
    areas = sorted((area(polygon) for outline in whole for polygon in outline.polygons), reverse=True)
    assert sorted((area(polygon) for outline in kept for polygon in outline.polygons), reverse=True) == pytest.approx(
        areas[:3], rel=0.02
    )


def test_segments_are_outlined_on_their_slices(case_of: CaseOf) -> None:
    case = case_of("brain_mr")
    found = case.analysis.findings.outlines()
    again = np.zeros_like(case.labels)
    for outline in found:
        again[outline.index][fill(outline.polygons, again.shape[1:])] = outline.label
    assert np.array_equal(again, case.labels)
    volumes = {measured.number: measured.volume_ml for measured in case.measurements}
    assert {(outline.label, outline.number, outline.text) for outline in found} == {
        (FIRST, 1, f"Right lung {show_number(volumes[FIRST], 'mL')} mL"),
        (SECOND, 2, f"Nodule {show_number(volumes[SECOND], 'mL')} mL"),
    }


def test_key_slices_of_segments_show_what_is_abnormal_first(case_of: CaseOf) -> None:
    case = case_of("siemens_ct")
    areas = [(case.labels == label).sum(axis=(1, 2)) for label in (SECOND, FIRST)]  # the nodule, then the lung
    assert case.analysis.findings.key_slices() == [int(each.argmax()) for each in areas]


def test_an_empty_label_map_points_nowhere(case_of: CaseOf) -> None:
    subject = case_of("siemens_ct").analysis.subject
    empty = dataclasses.replace(subject.labelmap, array=np.zeros_like(subject.labelmap.array))
    findings = SegmentFindings(dataclasses.replace(subject, prediction=empty))
    assert (findings.key_slices(), findings.outlines()) == ([], [])


def test_boxes_are_outlined_as_in_the_report(shared_data: Path) -> None:
    findings = measure(detect(shared_data))
    keys = findings.key_slices()
    assert len(keys) == 3
    found = [outline for outline in findings.outlines() if outline.index == keys[0]]
    assert [(outline.number, outline.text) for outline in found] == [(1, "1 Mass 93 %")]
    (group,) = (group for group in findings.groups({})[:1])
    tracked = {item.ConceptNameCodeSequence[0].CodeValue: item for item in group[0].ContentSequence}
    assert found[0].tracking == (tracked["112039"].TextValue, tracked["112040"].UID)
    nothing = measure(dataclasses.replace(detect(shared_data), prediction=Boxes(())))
    assert (nothing.key_slices(), nothing.outlines()) == ([], [])


def test_points_are_outlined_where_they_are(shared_data: Path) -> None:
    findings = measure(mark_head(shared_data))
    assert findings.key_slices() == [120, 121]  # the first has the only score
    assert [(outline.index, outline.point, outline.text) for outline in findings.outlines()] == [
        (121, (200.75, 150.0), "1 Left eye"),
        (120, (60.5, 150.25), "2 Right eye 81 %"),
    ]


def test_key_frames_are_those_of_the_surest_classes(shared_data: Path) -> None:
    assert measure(classify_breast(shared_data)).key_slices() == []  # one verdict for the whole image
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    values = tuple({0: 0.9 - frame / 100, 1: 0.1 + frame / 100} for frame in range(30))
    values = (*values[:-1], {0: 0.3, 1: 0.6})
    findings = measure(make_subject(image, headers, Scores(values), DENSITY))
    assert isinstance(findings, ScoreFindings)
    keys = findings.key_slices()
    assert keys[:4] == [0, 29, 1, 2]  # the surest frame of each class that holds, then the frequent one's others
    assert len(keys) == MOST_KEY_SLICES
    assert findings.outlines() == []


def test_many_points_have_few_key_slices(shared_data: Path) -> None:
    image, headers = read_planar(shared_data / "planar" / "us_colour_multiframe.dcm")
    points = tuple(Landmark(1, frame, 5.0, 5.0, 0.5 + frame / 60) for frame in range(30))
    findings = measure(make_subject(image, headers, Landmarks(points), LANDMARKS))
    assert findings.key_slices() == list(range(29, 9, -1))
