"""The images that matter as a Key Object Selection Document (PS3.3 A.35.4, PS3.16 TID 2010)."""

from __future__ import annotations

from collections.abc import Mapping

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.dicom.volume import SliceRef
from node.report.findings import Findings
from node.report.kinds import Kind
from node.report.seg import stamp
from node.report.source import complete_header
from node.report.sr import observe
from node.report.subject import MANUFACTURER


def make_keys(findings: Findings, objects: Mapping[str, Dataset]) -> Dataset | None:
    """The slices or frames that matter, the most important first, then the results that show and measure what is on
    them; None where the findings point at no image.

    `objects` are results by kind, such as the SEG and the SR; those of another study are left out, as a selection is of
    one study. TID 2010 takes any composite object: one with pixels is referred to as an image, another as a composite.
    """
    subject = findings.subject
    slices = [subject.source_slices[index] for index in findings.key_slices()]
    if not slices:
        return None
    headers = {str(header.SOPInstanceUID): header for header in subject.sources}
    images = [headers[uid] for uid in dict.fromkeys(ref.sop_instance_uid for ref in slices)]
    results = [result for result in objects.values() if result.StudyInstanceUID == images[0].StudyInstanceUID]
    what = "images" if slices[0].frame is None else "frames"
    content = KeyObjectSelection(
        document_title=codes.DCM.OfInterest,  # CID 7010
        referenced_objects=[*(_image(ref) for ref in slices), *results],
        observer_device_context=observe(subject),
        description=f"{subject.house.banner}. The {what} that show the findings of {subject.model_name} "
        f"{subject.model_version} best, the most important first, chosen by software; then its results.",
    )
    references = [item for item in content[0].ContentSequence if item.ValueType == "IMAGE"]
    for item, ref in zip(references, slices, strict=False):  # results that are images follow
        if ref.frame is not None:
            item.ReferencedSOPSequence[0].ReferencedFrameNumber = ref.frame
    document = KeyObjectSelectionDocument(
        evidence=[complete_header(images[0], subject.says), *images[1:], *results],
        content=content,
        series_instance_uid=subject.uid("keys", "series"),
        series_number=subject.series_number(Kind.KEYS),
        sop_instance_uid=subject.uid("keys"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
        series_description=subject.series_description(Kind.KEYS),
    )
    stamp(document, subject)
    del document.SeriesDate, document.SeriesTime  # of the Key Object Document Series module (PS3.3 C.17.6.1) no part
    return document


def _image(ref: SliceRef) -> Dataset:
    """As much of an image as highdicom looks at to refer to it as one."""
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = ref.sop_class_uid, ref.sop_instance_uid
    image.Rows = image.Columns = 1
    return image
