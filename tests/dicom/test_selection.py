"""Which series of a study a model takes: by its conditions and limits, by rank, and with a sentence for the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation

from node.dicom.assembly import Assembly, ImagePlan, VolumePlan, assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.selection import Choice, kernel_sharpness, select_input
from node.errors import InputRefused
from node.infer.manifest import Input
from node.infer.package import load_package
from tests.dicom.slices import PATIENT, write_series

LUNGS = load_package(Path(__file__).parents[2] / "models" / "ct_lung_reference").manifest.inputs["image"]


def choose(folder: Path, wanted: Input, shuffle: int = 0) -> Choice:
    paths = list(scan_folder(folder).files)
    random.Random(shuffle).shuffle(paths)
    return select_input(assemble_volumes({path: read_header(path) for path in paths}), wanted)


Build = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path) -> Build:
    """Adds a series to the study in `tmp_path`; its number is the end of its UID."""
    count = 0

    def add_series(name: str, slices: int = 40, step_mm: float = 5.0, **values: Any) -> None:
        nonlocal count
        count += 1
        write_series(
            tmp_path / f"{count:02d}", np.zeros((slices, 4, 4), np.int16), spacing_mm=(step_mm, 1, 1),
            SeriesDescription=name, StudyInstanceUID="1.2.3", **{"SeriesInstanceUID": f"1.2.3.{count}", **values},
        )  # fmt: skip

    return add_series


def chosen(choice: Choice) -> str:
    return str(choice.plan.header.SeriesDescription)


def test_lung_model_takes_the_thin_soft_axial_series_of_a_mixed_study(tmp_path: Path, add: Build) -> None:
    add("scout", 1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    add("dose report", 1, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    add("thick", 20, 8.0, ConvolutionKernel="STANDARD")
    add("thin sharp", 100, 2.0, ConvolutionKernel="LUNG")
    add("thin soft", 100, 2.0, ConvolutionKernel="STANDARD")
    add("thin, few", 15, 1.0, ConvolutionKernel="STANDARD")
    add("T1", 120, 1.0, Modality="MR")
    add("single", 1)
    choice = choose(tmp_path, LUNGS)
    assert chosen(choice) == "thin soft"
    assert choice.left_out == (
        "series ...1.2.3.1: ImageType says LOCALIZER",
        "series ...1.2.3.2: ImageType says SCREEN SAVE",
        "series ...1.2.3.8: a single slice makes no volume",
        "series thin, few: it covers 15 mm, the model needs 100 mm",
        "series T1: Modality is MR, which does not fit CT",
    )
    for shuffle in range(1, 6):
        again = choose(tmp_path, LUNGS, shuffle)
        assert (again.plan.slices, again.left_out) == (choice.plan.slices, choice.left_out)


def test_lung_model_takes_the_soft_kernel_of_a_real_study(shared_data: Path) -> None:
    choice = choose(shared_data / "chest_ct_siemens", LUNGS)
    assert isinstance(choice.plan, VolumePlan)
    assert {path.parent.name for path in choice.plan.paths} == {"soft_kernel_B40f"}
    assert choice.left_out == ()


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (["thinnest"], "thin, old"),
        (["thinnest", "most slices"], "thin, many"),
        (["most slices"], "thin, many"),
        (["newest"], "thick, new"),
        (["softest kernel"], "soft"),
        (["softest kernel", "thinnest"], "soft"),
        ([], "thin, old"),  # the first by series UID
    ],
)
def test_rank_decides_in_its_order(tmp_path: Path, add: Build, rank: list[str], expected: str) -> None:
    add("thin, old", 20, 1.0, AcquisitionDate="20240101", AcquisitionTime="120000", ConvolutionKernel="B60f")
    add("thin, many", 30, 1.0, AcquisitionDate="20240101", AcquisitionTime="130000", ConvolutionKernel="B60f")
    add("thick, new", 20, 4.0, AcquisitionDate="20240102", AcquisitionTime="0100", ConvolutionKernel="B60f")
    add("soft", 20, 2.0, AcquisitionDate="20240101", AcquisitionTime="235959.9", ConvolutionKernel="B20f")
    add("undated", 20, 3.0, AcquisitionTime="235959.99", ConvolutionKernel="B70f")
    wanted = Input.model_validate({"rank": rank})
    for shuffle in range(3):
        assert chosen(choose(tmp_path, wanted, shuffle)) == expected
    assembly = assemble_volumes({path: read_header(path) for path in scan_folder(tmp_path).files})
    backwards = Assembly(assembly.volumes[::-1], assembly.refusals)
    assert chosen(select_input(backwards, wanted)) == expected


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (("20240101", "115959"), ("20240101", "12")),  # TM may leave out what follows the hour
        (("20240101", "115959"), ("20240101", "1200")),
        (("20240101", "120000.1"), ("20240101", "120000.2")),
        (("20231231", "235959"), ("20240101", "")),
        (("", "235959"), ("20240101", "000000")),
    ],
)
def test_newest_by_date_then_time(tmp_path: Path, add: Build, earlier: tuple[str, str], later: tuple[str, str]) -> None:
    for name, (date, time), uid in (("later", later, "1.2.3.9"), ("earlier", earlier, "1.2.3.8")):
        add(name, 3, AcquisitionDate=date, AcquisitionTime=time, SeriesInstanceUID=uid)
    assert chosen(choose(tmp_path, Input.model_validate({"rank": ["newest"]}))) == "later"


LIMITS = [
    ({"slices_min": 41}, "it has 40 slices, the model needs 41"),
    ({"spacing_max_mm": 4.9}, "its voxels are 5.00 mm apart, the model takes up to 4.9 mm"),
    ({"coverage_min_mm": 201}, "it covers 200 mm, the model needs 201 mm"),
    ({"age_min_years": 18}, "the patient is younger than 18 years"),
    ({"age_max_years": 1}, "the patient is older than 1 years"),
]


@pytest.mark.parametrize(("limits", "sentence"), LIMITS, ids=[str(case[0]) for case in LIMITS])
def test_limits_refuse_with_a_sentence_without_patient_data(
    tmp_path: Path, add: Build, limits: dict[str, float], sentence: str
) -> None:
    add("chest", PatientAge="016M" if "age_max_years" in limits else "017Y")
    with pytest.raises(InputRefused) as refusal:
        choose(tmp_path, Input.model_validate({"limits": limits}))
    assert str(refusal.value) == f"not applicable: series chest: {sentence}"
    assert not any(text in str(refusal.value) for text in PATIENT.values())
    ((name, value),) = limits.items()
    kinder = value - 2 if name.endswith(("min", "min_mm", "min_years")) else value + 2
    assert chosen(choose(tmp_path, Input.model_validate({"limits": {name: kinder}}))) == "chest"


@pytest.mark.parametrize(("age", "fits"), [("090D", False), ("104W", True), ("013M", True), ("", True), ("old", True)])
def test_age_in_any_unit_and_unknown_age_is_not_held_against_a_study(
    tmp_path: Path, add: Build, age: str, fits: bool
) -> None:
    add("chest", PatientAge=age)
    wanted = Input.model_validate({"limits": {"age_min_years": 1}})
    if fits:
        assert chosen(choose(tmp_path, wanted)) == "chest"
    else:
        with pytest.raises(InputRefused, match="younger than 1 years"):
            choose(tmp_path, wanted)


def test_nothing_fits_says_why_of_each_series(shared_data: Path, tmp_path: Path, add: Build) -> None:
    with pytest.raises(InputRefused) as refusal:
        choose(shared_data / "brain_mr_t1", LUNGS)
    assert "not applicable: series " in str(refusal.value)
    assert "Modality is MR, which does not fit CT" in str(refusal.value)
    with pytest.raises(InputRefused, match="a slice is missing"):
        choose(shared_data / "irregular" / "sliceincrement", LUNGS)
    with pytest.raises(InputRefused, match=r"it is a planar image; .*it is a planar image"):
        choose(shared_data / "planar", LUNGS)
    with pytest.raises(InputRefused, match=r"^not applicable: there is no image$"):
        choose(tmp_path, LUNGS)
    add("", 3)
    with pytest.raises(InputRefused, match=r"^not applicable: series \.\.\.1\.2\.3\.1: it has 3 slices"):
        choose(tmp_path, LUNGS)


def test_condition_on_the_patient_does_not_show_them(tmp_path: Path, add: Build) -> None:
    add("chest")
    with pytest.raises(InputRefused) as refusal:
        choose(tmp_path, Input.model_validate({"when": {"PatientID": "someone"}}))
    assert "not shown" in str(refusal.value)
    assert not any(text in str(refusal.value) for text in (*PATIENT.values(), "someone"))


def test_description_cannot_steer_a_terminal(tmp_path: Path, add: Build) -> None:
    add("chest\x1b[2J\nERROR all is lost" + "x" * 100, 3)
    with pytest.raises(InputRefused) as refusal:
        choose(tmp_path, LUNGS)
    assert str(refusal.value).isprintable()
    assert "x" * 64 not in str(refusal.value)


def test_volumes_of_one_series_are_told_apart_in_the_sentence(shared_data: Path) -> None:
    with pytest.raises(InputRefused) as refusal:
        choose(shared_data / "irregular" / "sliceorientation", LUNGS)
    assert "volume 1: Modality" in str(refusal.value)
    assert "volume 2: Modality" in str(refusal.value)


def test_image_inputs_take_images(shared_data: Path) -> None:
    wanted = Input.model_validate({"kind": "image", "when": {"Modality": "MG"}})
    choice = choose(shared_data / "planar", wanted)
    assert isinstance(choice.plan, ImagePlan)
    assert choice.plan.paths[0].name == "mg_mammo.dcm"
    assert len(choice.left_out) == 3
    assert all("which does not fit MG" in sentence for sentence in choice.left_out)
    with pytest.raises(InputRefused, match="it is a volume"):
        choose(shared_data / "chest_ct_philips", wanted)


def test_newest_image_then_first_by_uid(tmp_path: Path) -> None:
    for number, time in ((1, "120000"), (2, "130000"), (4, "130000"), (3, "130000")):
        write_series(
            tmp_path / str(number), np.zeros((1, 4, 4), np.int16), SOPClassUID=DigitalXRayImageStorageForPresentation,
            SOPInstanceUID=f"1.2.3.{number}", SeriesInstanceUID=f"1.2.{9 - number}", AcquisitionDate="20240101",
            AcquisitionTime=time, Modality="DX",
        )  # fmt: skip
    for shuffle in range(4):
        plan = choose(tmp_path, Input.model_validate({"kind": "image"}), shuffle).plan
        assert plan.slices[0].sop_instance_uid == "1.2.3.2"


def test_clip_with_too_few_frames(shared_data: Path) -> None:
    wanted = Input.model_validate({"kind": "image", "when": {"Modality": "US"}, "limits": {"slices_min": 31}})
    with pytest.raises(InputRefused, match="it has 30 frames, the model needs 31"):
        choose(shared_data / "planar", wanted)


CONTRAST = [
    ({"ContrastBolusAgent": "OMNIPAQUE 350"}, True),
    ({"ContrastBolusAgent": ""}, False),
    ({"ContrastBolusAgent": "NONE"}, False),
    ({}, False),
    ({"ContrastBolusAgentSequence": [Dataset()]}, True),
    ({"ContrastBolusAgentSequence": []}, False),
    ({"ContrastBolusAgent": "GADOVIST", "ContrastBolusAgentAdministered": "NO"}, False),
]


@pytest.mark.parametrize(("values", "given"), CONTRAST, ids=[str(case[0])[:60] for case in CONTRAST])
def test_contrast_agent(tmp_path: Path, add: Build, values: dict[str, Any], *, given: bool) -> None:
    add("chest", **values)
    assert chosen(choose(tmp_path, Input.model_validate({"limits": {"contrast": given}}))) == "chest"
    assert chosen(choose(tmp_path, Input())) == "chest"
    sentence = "a contrast agent was given, the model takes none" if given else "no contrast agent is named, the model"
    with pytest.raises(InputRefused, match=sentence):
        choose(tmp_path, Input.model_validate({"limits": {"contrast": not given}}))


def test_largest_step_of_an_irregular_stack_counts(tmp_path: Path) -> None:
    headers = {}
    for index, path in enumerate(write_series(tmp_path, np.zeros((14, 4, 4), np.int16))):
        dataset = dcmread(path)
        dataset.ImagePositionPatient = ["0", "0", str(2 * index if index < 7 else 12 + 5 * (index - 6))]
        dataset.save_as(path)
        headers[path] = read_header(path)
    assembly = assemble_volumes(headers)
    assert assembly.volumes[0].grid.spacing_mm[0] == pytest.approx(47 / 13)
    select_input(assembly, Input.model_validate({"limits": {"spacing_max_mm": 5}}))
    with pytest.raises(InputRefused, match=r"its voxels are 5\.00 mm apart, the model takes up to 4 mm"):
        select_input(assembly, Input.model_validate({"limits": {"spacing_max_mm": 4}}))


def test_volumes_of_one_series_are_ranked_by_name_and_seen_by_conditions(tmp_path: Path, add: Build) -> None:
    for echo in range(1, 12):
        add("echoes", 3, SeriesInstanceUID="1.2.3.99", EchoTime=str(10 * echo))
    for shuffle in range(3):
        assert choose(tmp_path, Input(), shuffle).plan.name == "echo 1"
    choice = choose(tmp_path, Input.model_validate({"when": {"EchoTime": ">= 95"}}))
    assert choice.plan.name == "echo 10"  # not echo 11, and by number, not by letter
    assert "EchoTime is 10, which does not fit >= 95" in choice.left_out[0]
    with pytest.raises(InputRefused, match=r"^not applicable: series echoes \(11 volumes\): Modality is CT"):
        choose(tmp_path, Input.model_validate({"when": {"Modality": "MR"}}))


# From sharp to soft, by each maker's own description of its kernels.
KERNELS = [
    ["B80f", "B70f", "B60f", "B40f", "B31s", "B20f"],
    ["Bl64d", "Br49f\\3", "Br36d", "Hr32"],
    ["I70f", "I31f"],
    ["EDGE", "BONEPLUS", "BONE", "LUNG", "STANDARD", "SOFT"],
    ["FC51", "FC12", "FC08", "FC03"],
    ["YC", "YB", "YA", "C", "B", "A"],
]


@pytest.mark.parametrize("names", KERNELS, ids=lambda names: names[0])
def test_kernels_from_sharp_to_soft(names: list[str]) -> None:
    found = []
    for name in names:
        header = Dataset()
        header.ConvolutionKernel = name
        found.append(kernel_sharpness(header))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", ["", "UNHEARD OF", None])
def test_unknown_kernel_is_neither(name: str | None) -> None:
    header = Dataset()
    header.ConvolutionKernel = name
    assert kernel_sharpness(header) == kernel_sharpness(Dataset()) == 50
