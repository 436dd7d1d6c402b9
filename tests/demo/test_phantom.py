"""The phantom chest: valid DICOM, the same every time, with the volumes that it says."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from node.demo.phantom import LEFT_LUNG, RIGHT_LUNG, Lung, make_chest_phantom
from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_volume
from node.dicom.volume import Volume

OBLIQUE = ((0.96, 0.28, 0.0), (-0.2688, 0.9216, 0.28))


def read(paths: tuple[Path, ...]) -> Volume:
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return read_volume(plan)


@pytest.mark.parametrize("lung", [RIGHT_LUNG, LEFT_LUNG], ids=["right", "left"])
def test_closed_form_is_what_counting_points_gives(lung: Lung) -> None:
    """The oracle of other tests has its own: points of a 1 mm grid that lie inside, counted."""
    x, y, z = (
        np.arange(low, high, dtype=np.float32) + 0.37
        for low, high in (
            (lung.center_mm[0] - 90, lung.center_mm[0] + 90),
            (lung.center_mm[1] - 90, lung.center_mm[1] + 90),
            (lung.center_mm[2] - 150, lung.center_mm[2] + 150),
        )
    )
    count = lung.contains(x[:, None, None], y[None, :, None], z[None, None, :]).sum()
    assert count / 1000 == pytest.approx(lung.volume_ml, rel=1e-3)


@pytest.mark.parametrize(
    "scan",
    [
        {},
        {"feet_first": False, "slices": 60, "spacing_mm": (4.5, 2.0, 2.0), "shape": (190, 190)},
        {"directions": OBLIQUE, "slices": 90, "spacing_mm": (3.5, 2.0, 2.5), "shape": (190, 160)},
    ],
    ids=["axial", "head first", "oblique"],
)
def test_lung_in_the_files_has_the_known_volume(tmp_path: Path, scan: dict) -> None:
    """What is neither tissue nor outside, weighed by how full its voxels are: the mean HU gives the volume exactly."""
    phantom = make_chest_phantom(tmp_path, **scan)
    volume = read(phantom.paths)
    assert volume.grid.shape == (len(phantom.paths), *scan.get("shape", (256, 256)))
    assert volume.grid.spacing_mm == pytest.approx(scan.get("spacing_mm", (2.5, 1.5, 1.5)), rel=1e-5)
    slice_, row, column = np.indices(volume.array.shape, dtype=np.float32).reshape(3, -1)
    x, y, z = (volume.grid.affine_lps @ [column, row, slice_, np.ones_like(row)])[:3]
    hu = volume.array.ravel()
    for name, lung in (("right lung", RIGHT_LUNG), ("left lung", LEFT_LUNG)):
        assert phantom.volumes_ml[name] == lung.volume_ml
        grown = Lung(
            lung.center_mm, (lung.semi_axes_mm[0] + 9, lung.semi_axes_mm[1] + 9), lung.apex_mm + 9, lung.base_mm + 9
        )
        near = grown.contains(x, y, z)
        # Tissue is 40 HU, lung -850 HU; vessels (-0.7 %) are tissue, spine and airways stay outside.
        filled = np.clip((40 - hu[near]) / 890, None, 1.2).sum() * volume.grid.voxel_volume_mm3 / 1000
        assert filled == pytest.approx(lung.volume_ml, rel=0.02)
        deep = Lung(
            lung.center_mm, (lung.semi_axes_mm[0] - 6, lung.semi_axes_mm[1] - 6), lung.apex_mm - 6, lung.base_mm - 6
        )
        inside = hu[deep.contains(x, y, z)]
        assert np.median(inside) == pytest.approx(-850, abs=1)
        assert np.std(inside[inside < -700]) == pytest.approx(12, abs=3)
    # The left lung is where the patient's left is: +x in LPS.
    aired = (hu < -700) & (np.abs(x) < 150) & (np.abs(y) < 60)
    assert (x[aired] > 30).sum() / (x[aired] < -30).sum() == pytest.approx(
        LEFT_LUNG.volume_ml / RIGHT_LUNG.volume_ml, rel=0.15
    )


def test_files_are_valid_to_dciodvfy(tmp_path: Path) -> None:
    phantom = make_chest_phantom(tmp_path / "axial", slices=3)
    tilted = make_chest_phantom(tmp_path / "oblique", slices=2, directions=OBLIQUE, feet_first=False)
    for path in (*phantom.paths, *tilted.paths):
        ran = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        errors = [line for line in ran.stderr.splitlines() if line.startswith("Error")]
        assert not errors
        assert "CTImage" in ran.stderr
    ran = subprocess.run(["dcentvfy", *map(str, phantom.paths)], capture_output=True, text=True, check=False)
    assert "Error" not in ran.stderr + ran.stdout


def test_same_arguments_same_files_and_others_other_identities(tmp_path: Path) -> None:
    def digests(name: str, **arguments: object) -> list[str]:
        phantom = make_chest_phantom(tmp_path / name, slices=3, shape=(32, 32), **arguments)  # pyright: ignore
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in phantom.paths]

    first = digests("a")
    assert first == digests("b")
    for other in (digests("c", seed=1), digests("d", feet_first=False), digests("e", spacing_mm=(2.0, 1.5, 1.5))):
        assert not set(first) & set(other)
    uids = {dcmread(path).SOPInstanceUID for path in tmp_path.glob("*/*.dcm")}
    assert len(uids) == 4 * 3  # a and b are one study
    studies = {dcmread(path).StudyInstanceUID for path in tmp_path.glob("*/*.dcm")}
    assert len(studies) == 4
