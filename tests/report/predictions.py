"""Predictions of every kind on real images, reported as a worker reports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import VolumePlan
from node.dicom.header import read_header
from node.dicom.pixels import read_volume
from node.dicom.volume import Image, SliceRef, Volume
from node.infer.manifest import Manifest
from node.infer.results import Box, Boxes, Landmark, Landmarks, Prediction, Scores
from node.report.findings import Findings, measure
from node.report.results import make_results
from node.report.subject import Subject
from tests.report.cases import CREATED, plan_series

COMMON: dict[str, Any] = {
    "intended_use": "Tests of the report.",
    "licence_code": "Apache-2.0",
    "licence_weights": "none",
    "inputs": {"image": {}},
}
ABNORMAL = ["SCT", "49755003", "Morphologically Abnormal Structure"]
LUNG = ["SCT", "39607008", "Lung"]
DETECTION = COMMON | {
    "title": "Lung nodules",
    "task": "detection",
    "classes": {
        0: {
            "name": "Nodule",
            "category": ABNORMAL,
            "type": ["SCT", "27925004", "Nodule"],
            "anatomic_region": LUNG,
        },
        1: {"name": "Mass", "category": ABNORMAL, "type": ["SCT", "4147007", "Mass"], "anatomic_region": LUNG},
    },
    "score_min": 0.3,
}
LANDMARKS = COMMON | {
    "title": "Points of the head",
    "task": "landmarks",
    "classes": {
        1: {"name": "Left eye", "type": ["SCT", "81745001", "Eye"], "laterality": "left"},
        2: {"name": "Right eye", "type": ["SCT", "81745001", "Eye"], "laterality": "right"},
        3: {"name": "Pituitary", "type": ["SCT", "56329008", "Pituitary"]},
    },
}
DENSITY = COMMON | {
    "title": "Breast density",
    "task": "classification",
    "classes": {
        0: {"name": "Almost entirely fat", "type": ["SCT", "129716005", "Almost entirely fat"]},
        1: {"name": "Scattered", "type": ["SCT", "129717001", "Scattered fibroglandular densities"]},
        2: {"name": "Heterogeneously dense", "type": ["SCT", "129718006", "Heterogeneously dense"]},
        3: {"name": "Extremely dense", "type": ["SCT", "129719003", "Extremely dense"]},
    },
}


@dataclass(frozen=True)
class Told:
    """One prediction with what was made of it."""

    findings: Findings
    files: Mapping[str, Path]  # kind to file


def tell(subject: Subject, folder: Path) -> Told:
    """Measure and report, each object as a file."""
    findings = measure(subject)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for result in make_results(findings):
        files[result.name] = folder / f"{result.name}.dcm"
        files[result.name].write_bytes(result.encode())
    return Told(findings, files)


def make_subject(
    source: Volume | Image,
    headers: tuple[Dataset, ...],
    prediction: Prediction,
    manifest: Mapping[str, Any],
    key: str = "job",
) -> Subject:
    """The subject of a prediction of the synthetic model."""
    return Subject(
        key=key,
        created=CREATED,
        source=source,
        sources=headers,
        prediction=prediction,
        manifest=Manifest.model_validate(manifest),
        model_name="synthetic",
        model_version="1.2.3",
        model_digest="0123456789abcdef" * 4,
        node_version="9.9.9",
    )


def read_planar(path: Path) -> tuple[Image, tuple[Dataset, ...]]:
    """A planar image by pydicom alone, and its header."""
    dataset = dcmread(path)
    count = int(dataset.get("NumberOfFrames") or 1)
    pixels = dataset.pixel_array.reshape(count, dataset.Rows, dataset.Columns, -1)
    array = pixels[..., 0].astype(np.float32) if pixels.shape[-1] == 1 else pixels
    uids = str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)
    frames = tuple(SliceRef(*uids, number if count > 1 else None) for number in range(1, count + 1))
    spacing = dataset.get("ImagerPixelSpacing") or dataset.get("PixelSpacing")
    image = Image(
        array,
        frames,
        str(dataset.SeriesInstanceUID),
        str(dataset.StudyInstanceUID),
        str(dataset.Modality),
        (float(spacing[0]), float(spacing[1])) if spacing else None,
    )
    return image, (read_header(path),)


def annotated_box(shared_data: Path, volume: Volume, case: str = "chest_ct_philips") -> Box:
    """The radiologists' tumour as one box in the patient: one rectangle in pixels per slice, by SOP Instance UID."""
    numbers = {reference.sop_instance_uid: index for index, reference in enumerate(volume.slices)}
    corners = []
    for file in sorted((shared_data / "annotations" / case).glob("*.xml")):
        box = ElementTree.parse(file).find("object/bndbox")
        assert box is not None
        edges = {edge.tag: float(edge.text or "") for edge in box}
        for column, row in (("xmin", "ymin"), ("xmax", "ymax")):
            corners.append((edges[column], edges[row], numbers[file.stem]))
    places = volume.grid.to_lps(np.array(corners))
    x, y, z = places.min(axis=0).tolist()
    far_x, far_y, far_z = places.max(axis=0).tolist()
    return Box(1, 0.93, (x, y, z), (far_x, far_y, far_z))


def read_case(shared_data: Path, name: str) -> tuple[VolumePlan, Volume]:
    """A real series and its voxels."""
    plan = plan_series(shared_data, name)
    return plan, read_volume(plan)


def detect(shared_data: Path) -> Subject:
    """The annotated tumour, two made-up nodules and one below the threshold, in the Philips chest."""
    plan, volume = read_case(shared_data, "philips_ct")
    mass = annotated_box(shared_data, volume)
    x, y, z = mass.centre_lps
    nodules = (
        Box(0, 0.41, (x - 150.0, y - 4, z + 3), (x - 138.0, y + 8, z + 15)),
        Box(0, 0.72, (x - 120.0, y - 40, z - 22), (x - 112.0, y - 30, z - 14)),
        Box(0, 0.21, (x - 100.0, y - 40, z - 22), (x - 92.0, y - 30, z - 14)),
    )
    return make_subject(volume, plan.headers, Boxes((*nodules, mass)), DETECTION)


def mark_head(shared_data: Path) -> Subject:
    """Two points on the oblique MR of a head; the third is not found."""
    plan, volume = read_case(shared_data, "brain_mr")
    points = (Landmark(2, 120, 150.25, 60.5, 0.81), Landmark(1, 121, 150.0, 200.75), Landmark(3, 200, 10.0, 10.0, 0.1))
    return make_subject(volume, plan.headers, Landmarks(points), LANDMARKS)


def classify_breast(shared_data: Path) -> Subject:
    """The density of a mammogram."""
    image, headers = read_planar(shared_data / "planar" / "mg_mammo.dcm")
    scores = Scores(({0: 0.04, 1: 0.23, 2: 0.61, 3: 0.12},))
    return make_subject(image, headers, scores, DENSITY)
