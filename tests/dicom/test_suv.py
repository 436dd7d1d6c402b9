"""SUV by body weight, by hand and as QIBA's pseudo-code has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header
from node.dicom.pixels import read_volume
from node.dicom.suv import suv_factor
from node.dicom.volume import Volume
from tests.dicom.slices import write_series

HALF_LIFE_S = 6586.2  # F-18
HALF_LIFE_ZR89_S = 282276.0
DOSE_BQ = 370e6
WEIGHT_KG = 70.0
STORED = np.random.default_rng(5).integers(0, 30000, (4, 8, 8)).astype(np.int16)
TIMES = {"SeriesDate": "20260304", "SeriesTime": "110000", "AcquisitionDate": "20260304", "AcquisitionTime": "110130"}


def tracer(**changes: Any) -> Dataset:
    item = Dataset()
    values: dict[str, Any] = {
        "RadionuclideTotalDose": str(DOSE_BQ),
        "RadionuclideHalfLife": str(HALF_LIFE_S),
        "RadiopharmaceuticalStartTime": "100000",
    }
    for keyword, value in (values | changes).items():
        if value is not None:
            setattr(item, keyword, value)
    return item


def pet(**changes: Any) -> dict[str, Any]:
    values = {
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["ATTN", "DECY", "SCAT"],
        "PatientWeight": str(WEIGHT_KG),
        "RadiopharmaceuticalInformationSequence": [tracer()],
        "RescaleSlope": "2.5",
        **TIMES,
    }
    return {keyword: value for keyword, value in (values | changes).items() if value is not None}


def read(folder: Path, **values: Any) -> Volume:
    paths = write_series(folder, STORED, **values)
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return read_volume(plan)


def expected(elapsed_s: float) -> float:
    return WEIGHT_KG * 1000 / (DOSE_BQ * 2 ** (-elapsed_s / HALF_LIFE_S))


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "decay corrected to the scan's start": ({}, 3600),
    "decay corrected to the injection": ({"DecayCorrection": "ADMIN"}, 0),
    "a series made later counts by its first image": ({"SeriesTime": "180000"}, 3690),
    "the injection's own date and time": (
        {"RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartDateTime="20260304101000")]},
        3000,
    ),
    "a date that de-identification forgot": (
        {"RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartDateTime="20190101101000")]},
        3000,
    ),
    "a scan that began before the injection (dynamic)": (
        {"RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartTime="110020")]},
        -20,
    ),
    "the same with a date": (
        {"RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartDateTime="20260304110020")]},
        -20,
    ),
    "an injection written in another offset from UTC": (
        {
            "RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartDateTime="20260304091000+0000")],
            "TimezoneOffsetFromUTC": "+0100",
        },
        3000,
    ),
    "a tracer that lasts for days": (
        {
            "RadiopharmaceuticalInformationSequence": [
                tracer(RadiopharmaceuticalStartDateTime="20260228101000", RadionuclideHalfLife=str(HALF_LIFE_ZR89_S))
            ]
        },
        (4 * 86400 + 3000) * HALF_LIFE_S / HALF_LIFE_ZR89_S,
    ),
    "before midnight": (
        {
            "RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartTime="233000")],
            "SeriesTime": "003000",
            "AcquisitionTime": "003100",
        },
        3600,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_activity_becomes_suv(tmp_path: Path, case: str) -> None:
    changes, elapsed_s = CASES[case]
    volume = read(tmp_path, **pet(**changes))
    assert volume.unit == "SUVbw"
    np.testing.assert_allclose(volume.array, STORED * 2.5 * expected(elapsed_s), rtol=1e-5)


MISSING: dict[str, dict[str, Any]] = {
    "no weight": {"PatientWeight": None},
    "a weight of zero": {"PatientWeight": "0"},
    "no tracer": {"RadiopharmaceuticalInformationSequence": None},
    "no dose": {"RadiopharmaceuticalInformationSequence": [tracer(RadionuclideTotalDose=None)]},
    "a dose in MBq": {"RadiopharmaceuticalInformationSequence": [tracer(RadionuclideTotalDose="370")]},
    "a tracer that lasts for days, and no day": {
        "RadiopharmaceuticalInformationSequence": [tracer(RadionuclideHalfLife=str(HALF_LIFE_ZR89_S))]
    },
    "no half-life": {"RadiopharmaceuticalInformationSequence": [tracer(RadionuclideHalfLife=None)]},
    "no time of injection": {"RadiopharmaceuticalInformationSequence": [tracer(RadiopharmaceuticalStartTime=None)]},
    "no decay correction": {"DecayCorrection": "NONE"},
    "no time of the scan": {"SeriesTime": None},
    "no attenuation correction": {"CorrectedImage": ["DECY"]},
    "nothing said of corrections": {"CorrectedImage": None},
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_leaves_activity(tmp_path: Path, case: str) -> None:
    volume = read(tmp_path, **pet(**MISSING[case]))
    assert volume.unit == "Bq/ml"
    np.testing.assert_allclose(volume.array, STORED * 2.5, rtol=1e-6)


def philips(folder: Path, suv: str, activity: str, **changes: Any) -> Volume:
    paths = write_series(folder, STORED, **pet(Units="CNTS", **changes))
    for path in paths:
        dataset = dcmread(path)
        block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", suv)
        block.add_new(0x09, "DS", activity)
        dataset.save_as(path)
    (plan,) = assemble_volumes({path: read_header(path) for path in paths}).volumes
    return read_volume(plan)


def test_philips_counts_have_a_factor_of_their_own(tmp_path: Path) -> None:
    volume = philips(tmp_path, "0.000551", "1.4")
    assert volume.unit == "SUVbw"
    np.testing.assert_allclose(volume.array, STORED * 2.5 * 0.000551, rtol=1e-5)


def test_a_philips_factor_of_zero_does_not_hold(tmp_path: Path) -> None:
    volume = philips(tmp_path / "activity", "0", "1.4")
    np.testing.assert_allclose(volume.array, STORED * 2.5 * 1.4 * expected(3600), rtol=1e-5)
    volume = philips(tmp_path / "neither", "0", "0")
    assert volume.unit == ""
    np.testing.assert_allclose(volume.array, STORED * 2.5, rtol=1e-6)


def test_a_factor_of_an_implicit_vr_file_is_bytes() -> None:
    header = Dataset()
    header.Units = "CNTS"
    header.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "UN", b"0.25\0\0")
    assert suv_factor([header]) == 0.25
