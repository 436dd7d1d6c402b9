"""Sources of every geometry, a subject on each, and what every frame of its SEG has to be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import InputPlan, VolumePlan, assemble_volumes
from node.dicom.frames import FrameHeaders
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_input
from node.dicom.volume import Volume
from node.infer.package import Package
from node.infer.results import Labelmap
from node.report.kinds import SegForm
from node.report.results import Result
from node.report.seg import make_seg
from node.report.subject import Subject
from tests.dicom.slices import write_series
from tests.report.cases import CREATED, FIRST, SECOND, draw_mask, make_package

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


def make_subject(plan: InputPlan, labels: NDArray[np.uint16] | None = None, package: Package | None = None) -> Subject:
    """What reports on the plan's image are made of: two segments, or `labels`, and how probable they are."""
    source = read_input(plan)
    array = draw_mask(source.array.shape[:3]) if labels is None else labels
    package = package or make_package()
    probabilities = {label: draw_probabilities(array, label) for label in package.manifest.segments}
    return Subject(
        key="job",
        created=CREATED,
        source=source,
        sources=plan.headers,
        prediction=Labelmap(array, source.grid if isinstance(source, Volume) else None, probabilities=probabilities),
        manifest=package.manifest,
        model_name=package.name,
        model_version=package.version,
        model_digest=package.digest,
        node_version="0",
    )


def small_subject(folder: Path, shape: tuple[int, int, int], **changes: Any) -> Subject:
    """A subject on small axial slices; `changes` are of the manifest."""
    paths = write_series(folder, np.zeros(shape, np.int16))
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return make_subject(plan, draw_mask(shape), make_package(**changes))


def draw_probabilities(labels: NDArray[np.uint16], label: int) -> NDArray[np.uint8]:
    """At least half in the segment, less beside it, nothing elsewhere."""
    noise = (np.arange(labels.size, dtype=np.uint64) * 2654435761 // 256 % 127).astype(np.uint8).reshape(labels.shape)
    inside = labels == label
    return np.where(inside, 128 + noise, np.where(np.roll(inside, 3, axis=2), 1 + noise // 2, 0)).astype(np.uint8)


def write_seg(subject: Subject, path: Path, form: SegForm = SegForm.BINARY) -> Dataset:
    path.write_bytes(Result("seg", make_seg(subject, form)).encode())
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
        if seg.SegmentationType == "LABELMAP":
            assert np.array_equal(np.array([0, FIRST, SECOND])[frame], labels[index])
        else:
            label = (FIRST, SECOND)[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]
            assert np.array_equal(frame, planes_of(seg, subject, label)[index])
        if isinstance(subject.source, Volume):
            own = header if number is None else FrameHeaders(header)[number]
            assert groups.PlanePositionSequence[0].ImagePositionPatient == own.ImagePositionPatient
    if seg.SegmentationType == "LABELMAP":
        count = labels.any(axis=(1, 2)).sum()
    else:
        count = sum(planes_of(seg, subject, label).any(axis=(1, 2)).sum() for label in (FIRST, SECOND))
    assert len(frames) == count
    (series,) = seg.ReferencedSeriesSequence
    assert [item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence] == list(headers)
    assert series.SeriesInstanceUID == subject.source.series_uid


def planes_of(seg: Dataset, subject: Subject, label: int) -> NDArray[np.uint8] | NDArray[np.bool_]:
    """What the frames of one segment have to be."""
    if seg.SegmentationType == "BINARY":
        return subject.labelmap.array == label
    assert subject.labelmap.probabilities is not None
    return subject.labelmap.probabilities[label]


def some_frames(plan: VolumePlan, chosen: slice) -> VolumePlan:
    """A plan of some of the frames, as of one of several volumes in an instance."""
    grid = plan.grid
    affine = grid.affine_lps.copy()
    start, _, step = chosen.indices(grid.shape[0])
    affine[:3, 3] += start * affine[:3, 2]
    affine[:3, 2] *= step
    slices = plan.slices[chosen]
    grid = replace(grid, shape=(len(slices), *grid.shape[1:]), affine_lps=affine)
    return replace(plan, grid=grid, slices=slices, paths=plan.paths[chosen])


def uneven(folder: Path) -> VolumePlan:
    """A series whose last slices lie further apart, and whose orientation is not the same to the last digit."""
    gaps = np.array([0, 2, 4, 6, 8, 11, 14, 17.0])
    rng = np.random.default_rng(4)
    for path, depth in zip(write_series(folder, rng.integers(0, 99, (8, 20, 24)).astype(np.int16)), gaps, strict=True):
        dataset = dcmread(path)
        dataset.ImagePositionPatient = [-10, -20, 30 + depth]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, f"{depth * 1e-5:.6f}"]
        dataset.save_as(path)
    (plan,) = assemble_volumes({path: read_header(path) for path in sorted(folder.iterdir())}).volumes
    assert plan.positions_lps is not None
    return plan
