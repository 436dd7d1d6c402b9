"""SEGs of multi-frame, tilted, unevenly spaced and planar sources, judged by dciodvfy, dcmqi, highdicom and ourselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import highdicom as hd
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import InputPlan, VolumePlan, assemble_volumes
from node.dicom.frames import FrameHeaders
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_input
from node.dicom.volume import Image, Volume
from node.errors import InputRefused
from node.infer.results import Labelmap
from node.report.readback import read_labelmap
from node.report.results import Result
from node.report.seg import make_seg
from node.report.subject import Subject
from tests.dicom.slices import write_series
from tests.report.cases import CREATED, FIRST, SECOND, dciodvfy_errors, draw_mask, make_package, run

Kind = Literal["BINARY", "LABELMAP"]

REAL = {
    "enhanced_mr": ("enhanced/mr_siemens_xa30/In/5_anat-T1w_acq-tfl", 0),
    "enhanced_asl": ("enhanced/mr_siemens_xa30/In/27_asl_2d_tra", 0),
    "enhanced_mr_philips": ("enhanced/mr_philips", 0),
    "enhanced_ct": ("enhanced/eCT_Supplemental.dcm", 0),
    "tilted_ct": ("head_ct_tilted", 0),
    "mammogram": ("planar/mg_mammo.dcm", 0),
    "ultrasound_clip": ("planar/us_colour_multiframe.dcm", 0),
    "photograph": ("planar/xc_photo.dcm", 0),
    "radiograph": ("compressed/RG3_J2KR.dcm", 0),
}
VOLUMES = [name for name, (folder, _) in REAL.items() if "planar" not in folder and name != "radiograph"]
REGULAR = [name for name in VOLUMES if name != "tilted_ct"]
IMAGES = [name for name in REAL if name not in VOLUMES]


@cache
def plan_real(shared_data: Path, name: str) -> InputPlan:
    """The first volume or image of real data."""
    folder, number = REAL[name]
    assembly = assemble_volumes({path: read_header(path) for path in scan_folder(shared_data / folder).files})
    return (*assembly.volumes, *assembly.images)[number]


def make_subject(plan: InputPlan, labels: NDArray[np.uint16] | None = None) -> Subject:
    source = read_input(plan)
    array = draw_mask(source.array.shape[:3]) if labels is None else labels
    package = make_package()
    return Subject(
        key="job",
        created=CREATED,
        source=source,
        sources=plan.headers,
        prediction=Labelmap(array, source.grid if isinstance(source, Volume) else None),
        manifest=package.manifest,
        model_name=package.name,
        model_version=package.version,
        model_digest=package.digest,
        node_version="0",
    )


def write_seg(subject: Subject, path: Path, kind: Kind = "BINARY") -> Dataset:
    path.write_bytes(Result("seg", make_seg(subject, kind)).encode())
    return dcmread(path)


def check_frames(seg: Dataset, subject: Subject) -> None:
    """Every frame refers to the one slice that holds its pixels, and lies where that lies."""
    headers = {str(header.SOPInstanceUID): header for header in subject.sources}
    slices, labels = subject.source_slices, subject.labelmap.array
    places = {(ref.sop_instance_uid, ref.frame): index for index, ref in enumerate(slices)}
    frames = seg.pixel_array.reshape(-1, *labels.shape[1:])
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (item,) = groups.DerivationImageSequence[0].SourceImageSequence
        header = headers[item.ReferencedSOPInstanceUID]
        number = int(item.ReferencedFrameNumber) if "ReferencedFrameNumber" in item else None
        assert item.ReferencedSOPClassUID == header.SOPClassUID
        assert item.SpatialLocationsPreserved == "YES"
        index = places[item.ReferencedSOPInstanceUID, number]
        if "SegmentIdentificationSequence" in groups:
            segment = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            assert np.array_equal(frame > 0, labels[index] == (FIRST, SECOND)[segment - 1])
        else:
            assert np.array_equal(np.array([0, FIRST, SECOND])[frame], labels[index])
        if isinstance(subject.source, Volume):
            own = header if number is None else FrameHeaders(header)[number]
            assert groups.PlanePositionSequence[0].ImagePositionPatient == own.ImagePositionPatient
    wanted = {label for label in np.unique(labels) if label}
    count = sum((labels == label).any(axis=(1, 2)).sum() for label in wanted)
    assert len(frames) == (count if seg.SegmentationType == "BINARY" else labels.any(axis=(1, 2)).sum())
    (series,) = seg.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == list(headers)
    assert series.SeriesInstanceUID == subject.source.series_uid


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_what_was_written_is_read_back(shared_data: Path, tmp_path: Path, name: str, kind: Kind) -> None:
    subject = make_subject(plan_real(shared_data, name))
    seg = write_seg(subject, tmp_path / "seg.dcm", kind)
    check_frames(seg, subject)
    found = read_labelmap(seg, subject.source, (FIRST, SECOND))
    assert np.array_equal(found.array, subject.labelmap.array)
    assert found.grid is subject.labelmap.grid
    assert ("FrameOfReferenceUID" in seg) == isinstance(subject.source, Volume)


@pytest.mark.parametrize("name", REAL)
def test_dciodvfy_finds_no_error_of_ours(shared_data: Path, tmp_path: Path, name: str) -> None:
    subject = make_subject(plan_real(shared_data, name))
    write_seg(subject, tmp_path / "seg.dcm")
    assert dciodvfy_errors(tmp_path / "seg.dcm") == set()
