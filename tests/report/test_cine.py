"""Results of a cine, whose frames are instances of their own: each refers to the instance that it is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from highdicom import sr
from pydicom import dcmread
from pydicom.uid import generate_uid

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_image
from node.dicom.volume import Image
from node.infer.results import Labelmap, Landmark, Landmarks
from node.report.readback import read_labelmap
from node.report.seg import make_seg
from node.report.subject import Subject
from tests.report.cases import FIRST, MANIFEST, SECOND, dciodvfy_errors
from tests.report.predictions import LANDMARKS, make_subject, tell


@pytest.fixture(scope="module")
def cine(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Slices of a real MR series as if they were phases of one slice."""
    folder = tmp_path_factory.mktemp("cine")
    uid = generate_uid(entropy_srcs=["cine"])
    paths = sorted((shared_data / "compressed" / "mr_rle").iterdir())
    place = dcmread(paths[0]).ImagePositionPatient
    for number, path in enumerate(paths):
        dataset = dcmread(path)
        del dataset.PatientAge  # it is no valid one
        dataset.ImagePositionPatient = place
        dataset.SeriesInstanceUID, dataset.TriggerTime = uid, str(100 - 20 * number)
        dataset.save_as(folder / path.name)
    (plan,) = assemble_volumes({path: read_header(path) for path in folder.iterdir()}).images
    points = Landmarks((Landmark(3, 0, 30.0, 40.0, 0.9), Landmark(1, 2, 50.0, 60.5, 0.8)))
    return make_subject(read_image(plan), plan.headers, points, LANDMARKS)


def test_points_are_on_the_instances_of_their_frames(cine: Subject, tmp_path: Path) -> None:
    told = tell(cine, tmp_path)
    assert isinstance(cine.source, Image)
    assert len({ref.sop_instance_uid for ref in cine.source.frames}) == 4
    report = sr.srread(told.files["sr"])
    groups = report.content.get_planar_roi_measurement_groups()  # pyright: ignore[reportAttributeAccessIssue]
    shown = {
        group.tracking_identifier: group.roi.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for group in groups
    }
    frames = [ref.sop_instance_uid for ref in cine.source.frames]
    assert sorted(shown.values()) == sorted([frames[0], frames[2]])
    assert dciodvfy_errors(told.files["sr"]) == set()


def test_labels_are_on_the_instances_of_their_frames(cine: Subject, tmp_path: Path) -> None:
    source = cine.source
    assert isinstance(source, Image)
    labels = np.zeros(source.array.shape, np.uint16)
    for frame in (1, 3):
        labels[frame, 10 * frame : 60, 20:50] = FIRST if frame == 1 else SECOND
    subject = make_subject(source, cine.sources, Labelmap(labels, None), MANIFEST)
    seg = make_seg(subject)
    seg.save_as(tmp_path / "seg.dcm")
    assert np.array_equal(read_labelmap(dcmread(tmp_path / "seg.dcm"), source, (FIRST, SECOND)).array, labels)
    referred = [item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence]
    assert referred == [ref.sop_instance_uid for ref in source.frames]
