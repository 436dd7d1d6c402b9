"""Real series with synthetic masks, taken through `node.analyse` as a worker takes them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.analyse import Analysis, analyse
from node.dicom.assembly import VolumePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.volume import Image, Volume
from node.infer.manifest import Manifest
from node.infer.package import Package
from node.infer.results import Labelmap
from node.report.measure import SegmentMeasurements
from node.report.segments import SegmentFindings

# Label values with a gap: segment numbers (1, 2) are not the model's label values (2, 5).
FIRST, SECOND = 2, 5
MANIFEST: dict[str, Any] = {
    "title": "Two synthetic segments",
    "intended_use": "Tests of the report.",
    "licence_code": "Apache-2.0",
    "licence_weights": "none",
    "inputs": {"image": {}},
    "segments": {
        FIRST: {
            "name": "Right lung",
            "type": ["SCT", "39607008", "Lung"],
            "laterality": "right",
            "color_cielab": [72.0, -22.0, -32.0],
        },
        SECOND: {
            "name": "Nodule",
            "category": ["SCT", "49755003", "Morphologically Abnormal Structure"],
            "type": ["SCT", "27925004", "Nodule"],
            "anatomic_region": ["SCT", "39607008", "Lung"],
            "laterality": "left",
        },
    },
    "measurements": ["volume", "mean", "standard deviation", "minimum", "maximum"],
}
CREATED = datetime(2026, 3, 4, 5, 6, 7, 890123, UTC)
# What dciodvfy calls the objects that it is asked about here.
KNOWN_OBJECTS = {"Segmentation", "Comprehensive3DSR", "CTImage", "MRImage", "PETImage", "KeyObjectSelectionDocument"}
KNOWN_OBJECTS |= {"GrayscaleSoftcopyPresentationState", "ColorSoftcopyPresentationState", "RTStructureSet"}
# Case name to folder and what its series' files have in their path or as their modality.
SERIES = {
    "philips_ct": ("chest_ct_philips", "CT", ""),
    "siemens_ct": ("chest_ct_siemens", "CT", "soft_kernel_B40f"),
    "ge_ct": ("abdomen_ct_ge", "CT", ""),
    "brain_mr": ("brain_mr_t1", "MR", ""),
    "sarcoma_mr": ("sarcoma_ct_mr_pet", "MR", ""),
    "sarcoma_pet": ("sarcoma_ct_mr_pet", "PT", ""),
}


class SyntheticModel:
    """A model that answers with the mask that it was given."""

    def __init__(self, array: NDArray[np.uint16]):
        self.array = array

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap:
        """The mask on the grid of the one input."""
        volume = inputs["image"]
        assert isinstance(volume, Volume)
        return Labelmap(self.array, volume.grid)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Case:
    """One run: where it came from, and the objects that it made."""

    plan: VolumePlan
    analysis: Analysis
    folder: Path  # of seg.dcm and sr.dcm

    @property
    def volume(self) -> Volume:
        """The input."""
        return self.analysis.subject.volume

    @property
    def labels(self) -> NDArray[np.uint16]:
        """The label map."""
        return self.analysis.subject.labelmap.array

    @property
    def measurements(self) -> Sequence[SegmentMeasurements]:
        """What was measured of each segment."""
        findings = self.analysis.findings
        assert isinstance(findings, SegmentFindings)
        return findings.measurements

    @property
    def files(self) -> dict[str, Path]:
        """Kind to file of the results."""
        return {result.name: self.folder / f"{result.name}.dcm" for result in self.analysis.results}


@cache
def plan_series(shared_data: Path, name: str) -> VolumePlan:
    """The volume of one real series."""
    folder, modality, part = SERIES[name]
    files = [path for path in scan_folder(shared_data / folder).files if part in str(path)]
    volumes = assemble_volumes({path: read_header(path) for path in files}).volumes
    (plan,) = (volume for volume in volumes if volume.modality == modality)
    return plan


def draw_mask(shape: tuple[int, int, int]) -> NDArray[np.uint16]:
    """Two segments that no flip, rotation or shift maps onto themselves; one has a voxel in the grid's first corner."""
    slices, rows, columns = shape
    z, y, x = np.ogrid[:slices, :rows, :columns]
    depth = min(slices, 24)
    mask = np.zeros(shape, np.uint16)
    first = (z >= 2) & (z < depth // 2) & (y >= rows // 5) & (y < rows // 2) & (x >= columns // 6)
    mask[first & (x + y < columns // 2) & (z + 2 * x > columns // 4)] = FIRST
    second = (z >= depth // 3) & (z < depth - 1) & (y >= rows // 2) & (x >= columns // 2)
    mask[second & (2 * x / columns + y / rows + z / depth < 2.25) & (y < rows - 3)] = SECOND
    mask[0, 0, 0] = FIRST
    mask[slices - 1, rows - 1, columns - 2] = SECOND
    return mask


def make_package(version: str = "1.2.3", **changes: Any) -> Package:
    """The package of the synthetic model."""
    manifest = Manifest.model_validate(MANIFEST | changes)
    return Package("synthetic", Path("synthetic"), version, manifest, "0123456789abcdef" * 4)


def make_case(
    plan: VolumePlan, mask: NDArray[np.uint16], folder: Path, *, key: str = "job", package: Package | None = None
) -> Case:
    """Run the synthetic model on the volume and write its results to `folder`."""
    analysis = analyse(package or make_package(), SyntheticModel(mask), {"image": plan}, key=key, created=CREATED)
    folder.mkdir(parents=True, exist_ok=True)
    case = Case(plan, analysis, folder)
    for result in analysis.results:
        case.files[result.name].write_bytes(result.encode())
    return case


def run(*command: object) -> str:
    """Standard output and standard error of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def dciodvfy_errors(file: Path) -> set[str]:
    """The errors that dciodvfy finds in a file, each as 'attribute: what'; fails where it does not know the object."""
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, timeout=120, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert KNOWN_OBJECTS & set(said), said
    errors = [line for line in said if line.startswith("Error")]
    assert bool(errors) == bool(done.returncode), said
    return {re.sub(r" = <.*?>", "", line.removeprefix("Error - ")) for line in errors}
