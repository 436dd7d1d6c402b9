"""What OHIF shows of our results: the right segments in the right colours on the right slices, boxes, and numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.draw import polygon2mask

from node.infer.manifest import Measurement
from node.infer.results import Box, Boxes
from node.report.colors import segment_colors, to_rgb
from node.report.segments import SegmentFindings
from tests.report.readers import items
from tests.viewer.archive import MASS, Archive, Shown, slices_that_differ
from tests.viewer.ohif import Viewer
from tests.viewer.picture import Screen, find_colours, image_points, overlap


@pytest.mark.parametrize("form", ["binary", "labelmap"])
def test_segments_lie_where_they_are_in_their_own_colours(archive: Archive, viewer: Viewer, form: str) -> None:
    shown: Shown = getattr(archive, form)
    labels = shown.subject.labelmap.array
    viewer.open(*shown.opened)
    viewer.wait_for_segments(*(segment.name for segment in shown.subject.manifest.segments.values()))
    colours = {label: to_rgb(colour) for label, colour in segment_colors(shown.subject.manifest).items()}
    for index in slices_that_differ(labels):
        viewer.show(shown.volume.slices[index].sop_instance_uid)
        screen = Screen(viewer, shown.volume, index)
        seen = find_colours(screen.pixels, colours)
        wanted = screen.draw(labels[index])
        for label in colours:
            assert overlap(seen == label, wanted == label) > 0.95, f"segment {label} on slice {index + 1}"
        # What a shift by a slice, an upside-down volume or a mirrored plane would look like agrees less.
        others = {"the one before": labels[index - 1], "the one after": labels[index + 1]}
        others |= {"that of an upside-down volume": labels[-1 - index], "mirrored": labels[index, :, ::-1]}
        for other, plane in others.items():
            wrong = agreement(seen, screen.draw(plane))
            assert wrong < agreement(seen, wanted) - 0.02, f"slice {index + 1} looks like {other}"
        check_the_image(screen, viewer.window(), shown.volume.array[index], seen)


def test_contours_of_a_structure_set_enclose_the_segments(archive: Archive, viewer: Viewer) -> None:
    shown = archive.structures
    labels = shown.subject.labelmap.array
    viewer.open(*shown.opened)
    viewer.wait_for_segments(*(segment.name for segment in shown.subject.manifest.segments.values()))
    colours = {label: to_rgb(colour) for label, colour in segment_colors(shown.subject.manifest).items()}
    for index in slices_that_differ(labels):
        viewer.show(shown.volume.slices[index].sop_instance_uid)
        screen = Screen(viewer, shown.volume, index)
        drawn = viewer.contours()
        for label, colour in colours.items():
            enclosed = np.zeros(screen.inside.shape, bool)
            for seen, points in drawn:
                if np.abs(np.subtract(seen, colour)).max() <= 2:
                    enclosed ^= polygon2mask(enclosed.shape, points[:, ::-1] - 0.5)
            right, others = labels[index], (labels[index, :, ::-1], labels[-1 - index])
            agrees = overlap(enclosed, screen.draw(right) == label)
            assert agrees > 0.95, f"segment {label} on slice {index + 1}: {agrees:.2f}"
            assert all(overlap(enclosed, screen.draw(other) == label) < agrees - 0.02 for other in others)


def agreement(seen: NDArray[np.uint16], wanted: NDArray[np.generic]) -> float:
    """Mean overlap of the segments."""
    return float(np.mean([overlap(seen == label, wanted == label) for label in (1, 2)]))


def check_the_image(
    screen: Screen, window: tuple[float, float], voxels: NDArray[np.generic], seen: NDArray[np.uint16]
) -> None:
    """The greys beside the segments are those of this slice, and not of its mirror image."""
    bare = screen.inside & (seen == 0)
    greys = screen.pixels.mean(axis=-1)[bare]
    alike, mirrored = (
        np.corrcoef(greys, np.clip(screen.draw(plane)[bare], *window))[0, 1] for plane in (voxels, voxels[:, ::-1])
    )
    assert alike > max(0.95, mirrored + 0.1), (alike, mirrored)


def test_measurements_of_segments_stand_beside_their_places(archive: Archive, viewer: Viewer) -> None:
    shown = archive.measured
    viewer.open(*shown.opened)
    first = SegmentFindings(shown.subject).measurements[0]
    volume, mean = first.value(Measurement.VOLUME), first.value(Measurement.MEAN)
    viewer.wait_for_text(f"Volume: {volume:.2f} mL")
    viewer.wait_for_text(f"{mean:.2f} [hnsf'U]")
    index = int((shown.subject.labelmap.array == first.number).sum(axis=(1, 2)).argmax())
    assert viewer.shown() == shown.volume.slices[index].sop_instance_uid
    centre = next(item for item in items(shown.result) if item.ValueType == "SCOORD")
    column, row = np.array(centre.GraphicData) - 0.5
    assert shown.subject.labelmap.array[index, int(row), int(column)] == first.number
    (place,) = viewer.place(image_points(shown.volume, index, np.array([[column, row]])))
    # The arrow, and the line from it to its text.
    assert min(np.abs(ends - place).max(axis=1).min() for ends in viewer.arrows()) < 2


def test_a_detection_is_drawn_around_the_tumour(archive: Archive, viewer: Viewer) -> None:
    viewer.open(*archive.boxes.opened)
    check_the_mass(viewer, archive.boxes)


def test_a_report_with_an_absent_class_is_shown_with_our_addition(archive: Archive, tolerant_viewer: Viewer) -> None:
    tolerant_viewer.open(*archive.mass_without_nodules.opened)
    check_the_mass(tolerant_viewer, archive.mass_without_nodules)


def check_the_mass(viewer: Viewer, shown: Shown) -> None:
    """The radiologists' tumour: its box on the slice next to its centre, its certainty and its size."""
    box = mass_of(shown)
    viewer.wait_for_text(f"Certainty of Finding: {100 * box.score:.2f} %")
    sizes = np.subtract(box.high_lps, box.low_lps)
    for name, size in zip(("Width", "Depth", "Height"), sizes, strict=True):
        assert f"{name}: {size:.2f} mm" in viewer.annotations()
    heights = [
        float(image_points(shown.volume, index, np.zeros((1, 2)))[0, 2]) for index in range(len(shown.volume.slices))
    ]
    index = int(np.abs(np.subtract(heights, box.centre_lps[2])).argmin())
    assert viewer.shown() == shown.volume.slices[index].sop_instance_uid
    corners = viewer.place(np.array([box.low_lps, box.high_lps]) * (1, 1, 0) + (0, 0, box.centre_lps[2]))
    drawn = viewer.outlines()
    assert len(drawn) == 1
    assert drawn[0].min(axis=0) == pytest.approx(corners.min(axis=0), abs=1)
    assert drawn[0].max(axis=0) == pytest.approx(corners.max(axis=0), abs=1)


def mass_of(shown: Shown) -> Box:
    """The box of the radiologists' tumour."""
    prediction = shown.subject.prediction
    assert isinstance(prediction, Boxes)
    return next(box for box in prediction.boxes if box.label == MASS)
