"""Sequences that are encoded here, against what pydicom writes and highdicom reads."""

from __future__ import annotations

import io

import highdicom as hd
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from node.report.encoded import encode_items, with_encoded
from node.report.kinds import SegForm
from node.report.sr import make_sr
from tests.report.cases import Case
from tests.report.conftest import CaseOf


def test_encoded_items_are_what_pydicom_writes() -> None:
    """Of every VR that these sequences have, of text beyond ASCII, of nothing, and of lengths that need padding."""
    inner = Dataset()
    inner.CodeMeaning, inner.CodeValue, inner.LongCodeValue = "Größe", "1", "x" * 17
    item = Dataset()
    item.PatientName = "Müller^Jörg"
    item.PatientID, item.StudyDate, item.StudyTime, item.AccessionNumber = "odd", "20260304", "", None
    item.SOPInstanceUID, item.ImagePositionPatient, item.SliceThickness = "1.2.3", [1.5, -2, "3.25"], "2.5"
    item.DimensionIndexValues, item.ReferencedFrameNumber, item.Rows = [1, 2], [3, 4], 7
    item.TextValue, item.DerivationDescription, item.ImageComments = "text", "a\\b", "längere Worte"
    item.FloatingPointValue, item.SelectorATValue, item.ImageType = 0.25, 0x00100010, ["DERIVED", "PRIMARY"]
    item.ConceptNameCodeSequence = [inner]
    item.ContentSequence = []
    whole = Dataset()
    whole.SpecificCharacterSet = "ISO_IR 192"
    whole.ContentSequence = [item, inner]
    file = io.BytesIO()
    whole.save_as(file, implicit_vr=False, little_endian=True)
    assert file.getvalue().endswith(encode_items(whole.ContentSequence, "ISO_IR 192"))
    length = int.from_bytes(file.getvalue().split(b"\x40\x00\x30\xa7SQ\0\0")[1][:4], "little")
    assert length == len(encode_items(whole.ContentSequence, "ISO_IR 192"))


def test_a_report_is_what_pydicom_writes_and_highdicom_reads(case: Case) -> None:
    file = case.files["sr"].read_bytes()
    report = dcmread(io.BytesIO(file))
    assert encode_items(report.ContentSequence) == report_bytes(report)
    report.set_original_encoding(None, None)  # so that every element is encoded anew
    again = io.BytesIO()
    report.save_as(again, enforce_file_format=True, implicit_vr=False, little_endian=True)
    assert again.getvalue() == file
    content = hd.sr.Comprehensive3DSR.from_dataset(report).content
    assert isinstance(content, hd.sr.MeasurementReport)
    assert len(content.get_volumetric_roi_measurement_groups()) == 2


def report_bytes(report: Dataset) -> bytes:
    """The content as it lies in the file."""
    fresh = Dataset()
    fresh.ContentSequence = report.ContentSequence
    file = io.BytesIO()
    fresh.save_as(file, implicit_vr=False, little_endian=True)
    return file.getvalue()[12:]


def test_an_encoded_sequence_is_decoded_when_it_is_looked_at() -> None:
    item, whole = Dataset(), Dataset()
    item.CodeValue = "1"
    whole.file_meta = FileMetaDataset()
    whole.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    whole.SOPClassUID, whole.SOPInstanceUID, whole.PatientID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3", "ID-4711"
    whole.ContentSequence = [Dataset()]
    found = with_encoded(whole, {"ContentSequence": encode_items([item, item])})
    assert len(whole.ContentSequence) == 1, "the data set itself is left alone"
    assert found.PatientID == "ID-4711"
    assert [each.CodeValue for each in found.ContentSequence] == ["1", "1"]


def test_a_report_refers_to_nothing_but_its_evidence(case_of: CaseOf) -> None:
    case = case_of("siemens_ct")
    findings = case.analysis.findings
    assert findings is not None
    seg = findings.segmentation(SegForm.BINARY)
    assert seg is not None
    with pytest.raises(ValueError, match=f"refers to {seg.SOPInstanceUID}, which is no evidence of it"):
        make_sr(findings.subject, findings.groups(seg))
