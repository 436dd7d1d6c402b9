"""The SR, judged by dcmqi's reader and dsrdump (dciodvfy: in test_seg); its numbers by numpy on the source's files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom import sr
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr._cid_dict import cid_concepts
from pydicom.sr._concepts_dict import concepts

from node.dicom.codes import LATERALITY
from node.report.subject import Subject
from node.report.words import show_number
from tests.report.cases import FIRST, SECOND, Case, dciodvfy_errors, draw_mask, make_case, make_package, run
from tests.report.conftest import CaseOf
from tests.report.readers import as_dcmqi_reads, codes_in, items, numbers_of, unknown_codes

# Quantity and unit of the voxel values, by case: (scheme, value) each.
QUANTITIES = {
    "philips_ct": (("DCM", "112031"), ("UCUM", "[hnsf'U]")),
    "siemens_ct": (("DCM", "112031"), ("UCUM", "[hnsf'U]")),
    "ge_ct": (("DCM", "112031"), ("UCUM", "[hnsf'U]")),
    "brain_mr": (("DCM", "110852"), ("UCUM", "1")),
    "sarcoma_mr": (("DCM", "110852"), ("UCUM", "1")),
    "sarcoma_pet": (("DCM", "126401"), ("UCUM", "g/ml{SUVbw}")),  # Units GML, no SUVType: body weight (PS3.3 C.8.9.1)
}
MEAN, DEVIATION, MINIMUM, MAXIMUM = "373098007", "386136009", "255605001", "56851009"


def voxels_of(case: Case, label: int) -> np.ndarray:
    """The source's values under a segment: stored values and rescale read file by file."""
    values = []
    for path, labels in zip(case.plan.paths, case.labels, strict=True):
        dataset = dcmread(path, force=True)
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        stored = dataset.pixel_array[labels == label]
        real = stored.astype(np.float64) * slope + intercept
        if "PixelPaddingValue" in dataset:  # outside of the scanned circle lies air
            real[stored == np.array(dataset.PixelPaddingValue).astype(stored.dtype)] = -1024
        values.append(real)
    return np.concatenate(values)


def voxel_ml(case: Case) -> float:
    """The volume of one voxel from the headers: pixel spacing, and the distance of the outermost positions."""
    first, last = case.plan.headers[0], case.plan.headers[-1]
    span = np.linalg.norm(np.subtract(list(last.ImagePositionPatient), list(first.ImagePositionPatient)))
    return float(np.prod([float(x) for x in first.PixelSpacing]) * span / (len(case.plan.headers) - 1) / 1000)


def value_of(dataset: Dataset, name: str) -> Any:
    """The value of the one content item of this name that is not in a measurement group."""
    (found,) = (
        item for item in dataset.ContentSequence if item.get("ConceptNameCodeSequence", [{}])[0].CodeMeaning == name
    )
    return found


def test_dcmqi_reads_our_measurements(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    report = as_dcmqi_reads(case.files["sr"], tmp_path)
    seg = dcmread(case.files["seg"])
    quantity, unit = QUANTITIES[request.node.callspec.params["case"]]
    groups = report["Measurements"]
    assert [group["ReferencedSegment"] for group in groups] == [1, 2]
    for group, label in zip(groups, (FIRST, SECOND), strict=True):
        segment = seg.SegmentSequence[group["ReferencedSegment"] - 1]
        assert group["segmentationSOPInstanceUID"] == seg.SOPInstanceUID
        assert group["SourceSeriesForImageSegmentation"] == case.plan.series_uid
        assert group["TrackingUniqueIdentifier"] == segment.TrackingUID
        assert group["TrackingIdentifier"] == segment.TrackingID
        assert group["Finding"]["CodeValue"] == segment.SegmentedPropertyTypeCodeSequence[0].CodeValue
        assert group["measurementAlgorithmIdentification"]["AlgorithmName"] == "synthetic"
        assert group["measurementAlgorithmIdentification"]["AlgorithmVersion"] == "1.2.3"
        values = voxels_of(case, label)
        known = {
            MEAN: values.mean(),
            DEVIATION: values.std(),
            MINIMUM: values.min(),
            MAXIMUM: values.max(),
        }
        volume, *rest = group["measurementItems"]
        assert (volume["quantity"]["CodingSchemeDesignator"], volume["quantity"]["CodeValue"]) == ("SCT", "118565006")
        assert (volume["units"]["CodingSchemeDesignator"], volume["units"]["CodeValue"]) == ("UCUM", "mL")
        assert float(volume["value"]) == pytest.approx(len(values) * voxel_ml(case), rel=1e-5)
        found = {}
        for measured in rest:
            assert (measured["quantity"]["CodingSchemeDesignator"], measured["quantity"]["CodeValue"]) == quantity
            assert (measured["units"]["CodingSchemeDesignator"], measured["units"]["CodeValue"]) == unit
            found[measured["derivationModifier"]["CodeValue"]] = float(measured["value"])
        assert found == pytest.approx(known, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("modality", "changes", "quantity", "unit"),
    [
        ("sarcoma_pet", {"Units": "BQML"}, ("126401", "SUVbw"), "g/ml{SUVbw}"),
        (
            "sarcoma_pet",
            {"Units": "BQML", "PatientWeight": None},
            ("110821", "Nuclear Medicine Tomographic Activity"),
            "Bq/ml",
        ),
        ("sarcoma_pet", {"Units": "GML", "SUVType": "BW"}, ("126401", "SUVbw"), "g/ml{SUVbw}"),
        ("sarcoma_pet", {"Units": "GML", "SUVType": "LBM"}, ("110821", "Nuclear Medicine Tomographic Activity"), "1"),
        ("sarcoma_pet", {"Modality": "OT"}, None, ""),
        ("siemens_ct", {"RescaleType": "US"}, ("110850", "X-Ray Attenuation"), "1"),
    ],
)
def test_quantity_and_unit_follow_the_header(
    case_of: CaseOf,
    tmp_path: Path,
    modality: str,
    changes: dict[str, str | None],
    quantity: tuple[str, str] | None,
    unit: str,
) -> None:
    headers = []
    for header in case_of(modality).plan.headers:
        headers.append(header[:])
        for keyword, value in changes.items():
            if keyword in headers[-1]:
                delattr(headers[-1], keyword)
            setattr(headers[-1], keyword, value)
    whole = case_of(modality).plan
    plan = dataclasses.replace(
        whole, headers=tuple(headers), header=headers[len(headers) // 2], modality=headers[0].Modality
    )
    case = make_case(plan, draw_mask(plan.grid.shape), tmp_path)
    measured = [item for item in items(dcmread(case.files["sr"])) if item.ValueType == "NUM"]
    found = {
        (item.ConceptNameCodeSequence[0].CodeValue, item.ConceptNameCodeSequence[0].CodeMeaning): item
        for item in measured
        if any(part.ConceptNameCodeSequence[0].CodeValue == "121401" for part in item.get("ContentSequence", ()))
    }
    assert found.keys() == ({quantity} if quantity else set())
    for item in found.values():
        assert item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == unit


def test_flags_and_observer(case: Case) -> None:
    report = dcmread(case.files["sr"])
    assert report.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.34"
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "COMPLETE", "UNVERIFIED", "PRELIMINARY",
    )  # fmt: skip
    assert "VerifyingObserverSequence" not in report
    assert "unverified" in report.SeriesDescription
    template = report.ContentTemplateSequence[0]
    assert (template.MappingResource, template.TemplateIdentifier) == ("DCMR", "1500")
    subject: Subject = case.analysis.subject
    assert value_of(report, "Observer Type").ConceptCodeSequence[0].CodeMeaning == "Device"
    assert subject.device_uid == value_of(report, "Device Observer UID").UID
    assert value_of(report, "Device Observer Manufacturer").TextValue == "radnode"
    assert value_of(report, "Device Observer Model Name").TextValue == "synthetic 1.2.3"
    assert not any(item.ValueType == "PNAME" for item in items(report))
    assert report.SeriesNumber == 902
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "StudyID", "StudyDate"):
        assert str(report[keyword].value or "") == str(case.plan.header.get(keyword) or ""), keyword


def test_evidence_names_the_seg_and_every_source_image(case: Case) -> None:
    report = dcmread(case.files["sr"])
    seg = dcmread(case.files["seg"])
    named: dict[str, set[str]] = {}
    for keyword in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence"):
        for study in report.get(keyword, ()):
            assert study.StudyInstanceUID == case.plan.study_uid
            for series in study.ReferencedSeriesSequence:
                uids = {str(item.ReferencedSOPInstanceUID) for item in series.ReferencedSOPSequence}
                named.setdefault(str(series.SeriesInstanceUID), set()).update(uids)
    assert named == {
        case.plan.series_uid: {str(header.SOPInstanceUID) for header in case.plan.headers},
        str(seg.SeriesInstanceUID): {str(seg.SOPInstanceUID)},
    }


def test_dsrdump_prints_it_without_complaint(case: Case) -> None:
    said = run("dsrdump", "+Pu", "+Pc", case.files["sr"])
    complaints = [line for line in said.splitlines() if re.match(r"[WEF]: ", line)]
    # DCMTK checks no values in UTF-8; the character set is that of the source.
    utf8 = "W: The VR checker does not support this Specific Character Set: ISO_IR 192"
    assert complaints == ([utf8] if case.plan.header.get("SpecificCharacterSet") == "ISO_IR 192" else [])
    assert "Imaging Measurements" in said
    assert said.count("Measurement Group") == 2


def test_every_code_is_in_its_dictionary(case: Case) -> None:
    """Scheme, value and meaning of every coded concept against the dictionaries that pydicom makes of the standard."""
    codes = [code for file in case.files.values() for code in codes_in(dcmread(file))]
    assert not unknown_codes(codes)
    assert len(codes) > 50


@pytest.mark.parametrize(
    ("name", "cid"), [("Procedure reported", 100), ("Language of Content Item and Descendants", None)]
)
def test_context_codes_are_of_their_context_group(case: Case, name: str, cid: int | None) -> None:
    code = value_of(dcmread(case.files["sr"]), name).ConceptCodeSequence[0]
    if cid is None:
        assert (code.CodingSchemeDesignator, code.CodeValue) == ("RFC5646", "en")
        return
    group = cid_concepts[cid].get(code.CodingSchemeDesignator, [])
    assert code.CodeValue in {v for keyword in group for v in concepts[code.CodingSchemeDesignator][keyword]}
    assert case.plan.modality.replace("PT", "PET").replace("MR", "MRI") in code.CodeMeaning.split()


def test_laterality_codes_are_cid_244() -> None:
    group = {
        (value, meaning)
        for keyword in cid_concepts[244]["SCT"]
        for value, (meaning, groups) in concepts["SCT"][keyword].items()
        if 244 in groups
    }
    assert {(code.value, code.meaning) for code in LATERALITY.values()} == group
    assert {code.scheme for code in LATERALITY.values()} == {"SCT"}


@pytest.mark.parametrize("found", [(), (FIRST,), (SECOND,)])
def test_what_was_not_found_is_said(case_of: CaseOf, tmp_path: Path, found: tuple[int, ...]) -> None:
    plan = case_of("siemens_ct").plan
    mask = draw_mask(plan.grid.shape)
    case = make_case(plan, np.where(np.isin(mask, found), mask, 0).astype(np.uint16), tmp_path)
    file = case.files["sr"]
    assert not dciodvfy_errors(file)
    run("dsrdump", file)
    report = sr.srread(file)
    groups = [item for item in items(report) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]
    assert len(groups) == 2
    said = {}
    for group in groups:
        names = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in group.ContentSequence}
        presence = names.get("Presence of property")
        if presence is None:
            assert {"Volume", "Referenced Segment"} <= names.keys()
        else:
            assert not {item.ValueType for item in group.ContentSequence} & {"NUM", "IMAGE"}
        said[names["Finding"].ConceptCodeSequence[0].CodeMeaning] = presence and presence.ConceptCodeSequence[0]
    for label, name in ((FIRST, "Lung"), (SECOND, "Nodule")):
        if label in found:
            assert said[name] is None
        else:
            assert (said[name].CodingSchemeDesignator, said[name].CodeValue) == ("SCT", "272519000")
            assert said[name].CodeMeaning == "Absent"
    measured = as_dcmqi_reads(file, tmp_path).get("Measurements", []) if found else []
    assert [group["ReferencedSegment"] for group in measured if "ReferencedSegment" in group] == [
        number for number, label in ((1, FIRST), (2, SECOND)) if label in found
    ]


def test_diameters_are_drawn_where_they_were_measured(case_of: CaseOf, tmp_path: Path) -> None:
    """A group of their own (TID 1501) with a line per diameter, which is as long as it says and lies on the segment."""
    plan = case_of("brain_mr").plan  # oblique, pixels and slices of different size
    wanted = ["volume", "longest diameter", "perpendicular diameter", "mean"]
    case = make_case(plan, draw_mask(plan.grid.shape), tmp_path, package=make_package(measurements=wanted))
    report = dcmread(case.files["sr"])
    # The age without leading zeros is the source's own.
    assert not [error for error in dciodvfy_errors(case.files["sr"]) if not error.startswith("</PatientAge(")]
    assert not unknown_codes(codes_in(report))
    run("dsrdump", case.files["sr"])
    assert len(as_dcmqi_reads(case.files["sr"], tmp_path)["Measurements"]) >= 2
    headers = {str(header.SOPInstanceUID): header for header in plan.headers}
    slices = {reference.sop_instance_uid: index for index, reference in enumerate(case.volume.slices)}
    groups = [item for item in items(report) if item.ConceptNameCodeSequence[0].CodeValue == "125007"]
    regions, drawn = groups[:2], groups[2:]
    assert len(drawn) == 2
    for label, number, region, group in zip((FIRST, SECOND), range(2), regions, drawn, strict=True):
        tracked = [
            item.UID for each in (region, group) for item in each.ContentSequence if item.ValueType == "UIDREF"
            and item.ConceptNameCodeSequence[0].CodeValue == "112040"
        ]  # fmt: skip
        assert len(set(tracked)) == 1
        assert len(tracked) == 2
        directions = []
        for name, number_item in zip(("Long axis", "Short axis"), nums(group), strict=True):
            value = float(number_item.MeasuredValueSequence[0].NumericValue)
            assert number_item.ConceptNameCodeSequence[0].CodeMeaning == name
            assert numbers_of(report, number)[name] == value
            (line,) = (item for item in number_item.ContentSequence if item.ValueType == "SCOORD")
            assert (line.GraphicType, line.RelationshipType) == ("POLYLINE", "INFERRED FROM")
            uid = str(line.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
            row_mm, column_mm = (float(value) for value in headers[uid].PixelSpacing)
            ends = np.array(line.GraphicData, np.float64).reshape(2, 2)
            arm = (ends[1] - ends[0]) * (column_mm, row_mm)
            assert np.linalg.norm(arm) == pytest.approx(value, abs=1e-3)
            directions.append(arm)
            for column, row in ends:  # half a pixel from a labelled one
                near = case.labels[slices[uid]][
                    max(0, int(np.floor(row - 0.6))) : int(np.floor(row + 0.6)) + 1,
                    max(0, int(np.floor(column - 0.6))) : int(np.floor(column + 0.6)) + 1,
                ]
                assert (near == label).any()
        assert abs(directions[0] @ directions[1]) < 0.05


def nums(group: Dataset) -> list[Dataset]:
    """The measurements of a group."""
    return [item for item in group.ContentSequence if item.ValueType == "NUM"]


def test_every_number_is_said_alike(case: Case) -> None:
    """In the report, in the rows for people and on the preview: the same digits."""
    report = dcmread(case.files["sr"])
    for number, (measured, line) in enumerate(
        zip(case.measurements, case.analysis.findings.lines(), strict=True)  # pyright: ignore[reportOptionalMemberAccess]
    ):
        rows = measured.rows()
        assert list(numbers_of(report, number).values()) == [row["value"] for row in rows]
        assert [cell.text for cell in line.cells] == [show_number(row["value"], row["unit"]) for row in rows]
