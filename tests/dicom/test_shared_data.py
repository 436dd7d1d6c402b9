"""What every folder of the shared data yields: its volumes, its images, and the sentence for everything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from node.dicom.assembly import Assembly, assemble_volumes
from node.dicom.header import read_header, scan_folder

RTSTRUCT = "1 refused: RT Structure Set Storage is no image"
SEGMENTATION = "1 refused: Segmentation Storage is a result, no image"
SINGLE = "1 refused: a single slice makes no volume"
NO_POSITION = "it has no position in the patient (ImagePositionPatient, ImageOrientationPatient)"
XA30 = "enhanced/mr_siemens_xa30/In"

# Folder to what it yields; within a folder volumes, then images, then refusals, each in the order of series UIDs.
YIELDS = {
    "abdomen_ct_ge/image": ["CT 41 x 512 x 512"],
    "brain_mr_t1": ["MR 384 x 384 x 274"],
    "chest_ct_philips": ["CT 64 x 512 x 512"],
    "chest_ct_siemens/lung_kernel_B70f": ["CT 30 x 512 x 512"],
    "chest_ct_siemens/soft_kernel_B40f": ["CT 30 x 512 x 512"],
    # Single instances without siblings: the MR one is a slice, the others are images. Two belong to no study or series.
    "compressed": [
        "CR image: 1 x 1760 x 1760 grey",
        "US image: 1 x 480 x 640 colour",
        "NM image: 1 x 1024 x 256 grey",
        "2 refused: it has no StudyInstanceUID or no SeriesInstanceUID",
        SEGMENTATION,
        SINGLE,
    ],
    "compressed/mr_j2k": ["MR 4 x 256 x 256"],
    "compressed/mr_jpeg": ["MR 4 x 256 x 256"],
    "compressed/mr_jpegls": ["MR 4 x 256 x 256"],
    "compressed/mr_rle": ["MR 4 x 256 x 256"],
    # The four small MR objects have lost their functional groups, and with them every position.
    "enhanced": ["CT 2 x 512 x 512", f"4 refused: {NO_POSITION}"],
    "enhanced/mr_philips": ["MR 8 x 256 x 256"],
    f"{XA30}/11_DWI_dir80_PA": ["MR 39 x 72 x 72"],  # the ADC map
    f"{XA30}/14_DWI_dir80_PA": [
        "1 refused: it is a colour image of slices, which holds no measured values"  # the colour FA map
    ],
    f"{XA30}/27_asl_2d_tra": ["MR 12 x 64 x 64"],
    f"{XA30}/5_anat-T1w_acq-tfl": ["MR 96 x 128 x 128"],
    f"{XA30}/9_gre_field_mapping": ["MR 33 x 64 x 64"],
    "head_ct_tilted": ["CT 54 x 512 x 512 irregular"],
    "irregular": [SEGMENTATION, SINGLE, SINGLE],
    "irregular/gantrytilting": ["CT 4 x 512 x 512 irregular"],
    # Bolus tracking: one place, watched.
    "irregular/notavolume": ["4 refused: all 4 slices lie at one place, 61.50 mm along the normal"],
    "irregular/sliceincrement": [
        "4 refused: a slice is missing: 10.00 mm between slices 3 and 4 of 4, 5.00 mm elsewhere"
    ],
    # Sagittal and oblique axial slices, two each.
    "irregular/sliceorientation": ["MR 2 x 288 x 288 (volume 1)", "MR 2 x 288 x 288 (volume 2)"],
    "lung_tumour_ct_rtstruct/image": ["CT 60 x 201 x 204"],
    "lung_tumour_ct_rtstruct/mask": [RTSTRUCT],
    "planar": [
        "OP image: 1 x 1536 x 1536 grey",
        "MG image: 1 x 3062 x 2394 grey",
        "US image: 30 x 240 x 320 colour",
        "XC image: 1 x 600 x 600 colour",
    ],
    "sarcoma_ct_mr_pet/CT/image": ["CT 79 x 199 x 162"],
    "sarcoma_ct_mr_pet/CT/mask": [RTSTRUCT],
    "sarcoma_ct_mr_pet/MR_T1/image": ["MR 79 x 155 x 126"],
    "sarcoma_ct_mr_pet/MR_T1/mask": [RTSTRUCT],
    "sarcoma_ct_mr_pet/PET/image": ["PT 79 x 37 x 37"],
    "sarcoma_ct_mr_pet/PET/mask": [RTSTRUCT],
}


def describe(assembly: Assembly) -> list[str]:
    lines = []
    for volume in assembly.volumes:
        size = " x ".join(map(str, volume.grid.shape))
        name = f" ({volume.name})" if volume.name else ""
        irregular = " irregular" if volume.positions_lps is not None else ""
        lines.append(f"{volume.modality} {size}{irregular}{name}")
    for image in assembly.images:
        size = " x ".join(map(str, image.shape))
        name = image.name or f"{image.modality} image"
        lines.append(f"{name}: {size} {'colour' if image.colour else 'grey'}")
    lines += (f"{len(refusal.sop_instance_uids)} refused: {refusal.sentence}" for refusal in assembly.refusals)
    return lines


def headers_by_folder(root: Path) -> dict[str, dict[Path, Dataset]]:
    folders: dict[str, dict[Path, Dataset]] = {}
    for path in scan_folder(root).files:
        folders.setdefault(path.parent.relative_to(root).as_posix(), {})[path] = read_header(path)
    return folders


@pytest.fixture(scope="module")
def folders(shared_data: Path) -> dict[str, dict[Path, Dataset]]:
    return headers_by_folder(shared_data)


def test_every_folder_is_in_the_table(folders: dict[str, dict[Path, Dataset]]) -> None:
    assert set(folders) == set(YIELDS)


@pytest.mark.parametrize("folder", YIELDS)
def test_folder_yields(folders: dict[str, dict[Path, Dataset]], folder: str) -> None:
    headers = folders[folder]
    assembly = assemble_volumes(headers)
    assert describe(assembly) == YIELDS[folder]
    # Every instance is accounted for, once.
    named = [uid for refusal in assembly.refusals for uid in refusal.sop_instance_uids]
    for plan in (*assembly.volumes, *assembly.images):
        named += {ref.sop_instance_uid for ref in plan.slices}
        assert {str(header.SOPInstanceUID) for header in plan.headers} == {ref.sop_instance_uid for ref in plan.slices}
    assert sorted(named) == sorted(str(header.SOPInstanceUID) for header in headers.values())


@pytest.mark.parametrize("folder", YIELDS)
def test_sentences_show_no_patient(folders: dict[str, dict[Path, Dataset]], folder: str) -> None:
    sentences = [refusal.sentence for refusal in assemble_volumes(folders[folder]).refusals]
    for header in folders[folder].values():
        for keyword in ("PatientName", "PatientID", "PatientBirthDate"):
            text = str(header.get(keyword, "") or "")
            assert not text or all(text not in sentence for sentence in sentences), keyword


def test_all_at_once_in_any_order(folders: dict[str, dict[Path, Dataset]]) -> None:
    """A node sees every series of a study at once; that changes nothing but what shares a series UID."""
    kept = [name for name in folders if name not in ("compressed/mr_jpeg", "compressed/mr_jpegls", "compressed/mr_rle")]
    everything = [member for name in kept for member in folders[name].items()]
    expected = sorted(line for name in kept for line in YIELDS[name])
    first = assemble_volumes(dict(everything))
    assert sorted(describe(first)) == expected
    random.Random(7).shuffle(everything)
    again = assemble_volumes(dict(everything))
    assert describe(again) == describe(first)
    assert [plan.paths for plan in again.volumes] == [plan.paths for plan in first.volumes]
