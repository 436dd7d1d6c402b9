"""The Structured Report of a run: Comprehensive 3D SR after TID 1500 (PS3.16), and the parts that every group has.

What the groups say, the kinds of findings know: `segments`, `boxes`, `landmarks`, `scores` and `negative` beside this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypedDict

from highdicom import sr
from pydicom.dataset import Dataset, FileDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode

from node.dicom.codes import LATERALITY
from node.dicom.volume import SliceRef
from node.infer.manifest import Finding
from node.report.encoded import encode_items, with_encoded
from node.report.kinds import Kind
from node.report.library import describe_images
from node.report.references import frames_by_instance
from node.report.seg import coded, stamp
from node.report.source import complete_header
from node.report.subject import MANUFACTURER, Origin, Subject

Group = (
    sr.MeasurementsAndQualitativeEvaluations
    | sr.PlanarROIMeasurementsAndQualitativeEvaluations
    | sr.VolumetricROIMeasurementsAndQualitativeEvaluations
)

_PROCEDURES = {
    "CT": codes.LN.CTUnspecifiedBodyRegion,
    "MR": codes.LN.MRIUnspecifiedBodyRegion,
    "PT": codes.LN.PETUnspecifiedBodyRegion,
    "NM": codes.LN.NMUnspecifiedBodyRegion,
    "CR": codes.LN.XRUnspecifiedBodyRegion,
    "DX": codes.LN.XRUnspecifiedBodyRegion,
}


class PlainMeasurement(sr.Measurement):
    """A measurement (TID 300) that refers to no coordinates of its own.

    highdicom looks for such in each measurement of a region's group, by making every item within it anew: a fifth of
    the time of a large report. Concepts that many measurements share are best made once, as `CodedConcept`.
    """

    @property
    def referenced_coordinates(self) -> list[sr.CoordinatesForMeasurement | sr.CoordinatesForMeasurement3D]:
        """None."""
        return []


class Described(TypedDict):
    """What every measurement group says beside its measurements (TID 1501, 1410, 1411)."""

    tracking_identifier: sr.TrackingIdentifier
    finding_type: sr.CodedConcept
    finding_category: sr.CodedConcept
    finding_sites: list[sr.FindingSite] | None
    algorithm_id: sr.AlgorithmIdentification


def make_sr(
    origin: Origin, groups: Sequence[Group], *, about: Sequence[Dataset] = (), name: str = "sr", description: str = ""
) -> FileDataset:
    """The report of a run: its measurement groups, at least one, and the images that it was made from.

    `about` are the objects beside the source images that the groups refer to. The UIDs derive from `name`;
    `description` is that of the series, where it is not the usual one. The report names the earlier ones of the origin
    as those that it replaces (Predecessor Documents Sequence, PS3.3 C.17.2), which of our objects only an SR can.
    """
    sources = [complete_header(source, origin.says + name + description) for source in origin.sources]
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observe(origin)),
        # CID 100: the modality's own term; which region, the codes of the findings say.
        procedure_reported=_PROCEDURES.get(str(sources[0].get("Modality", "")), codes.SCT.ImagingProcedure),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(
            sr.CodedConcept("en", "RFC5646", "English")
        ),
    )
    # highdicom's own library wants a position of every image, and takes 1.7 MB and 8 s to describe 384 slices.
    if images := [source for source in sources if "Rows" in source]:
        content = report[0].ContentSequence
        content.insert(len(content) - 1, describe_images(images))
    evidence = [*sources, *about]
    content = report[0].ContentSequence
    _check_references(content, evidence)
    # highdicom copies and checks again whatever is in the document, which takes seconds for a hundred groups: it gets
    # the first item only, and the whole takes its place.
    root = report[0][:]
    del root.ContentSequence
    root.ContentSequence = list(content[:1])
    document = sr.Comprehensive3DSR(
        evidence=evidence,
        content=root,
        series_instance_uid=origin.uid(name, "series"),
        series_number=origin.series_number(Kind.SR),
        sop_instance_uid=origin.uid(name),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,  # preliminary: nobody has read it
        is_verified=False,
        previous_versions=_predecessors(origin, name) or None,
        series_description=description or origin.series_description(Kind.SR),
        manufacturer_model_name=f"{origin.model_name} {origin.model_version}"[:64],
        software_versions=f"radnode {origin.node_version}",
        device_serial_number=origin.model_digest[:16],
    )
    stamp(document, origin)
    del document.SeriesDate, document.SeriesTime  # of the SR Document Series module (PS3.3 C.17.1) neither is part
    return with_encoded(document, {"ContentSequence": encode_items(content, document.get("SpecificCharacterSet"))})


def describe(origin: Origin, finding: Finding, *track: str, number: int | None = None) -> Described:
    """The finding and who says so; `track` names what is tracked, within the job, and `number` is told to people."""
    identifier, uid = identify_finding(origin, finding, *track, number=number)
    return {
        "tracking_identifier": sr.TrackingIdentifier(uid=uid, identifier=identifier),
        "finding_type": coded(finding.type),
        "finding_category": coded(finding.category),
        "finding_sites": _sites(finding),
        "algorithm_id": identify_algorithm(origin),
    }


def identify_finding(origin: Origin, finding: Finding, *track: str, number: int | None = None) -> tuple[str, str]:
    """Tracking ID and UID of a finding, the same in every result; arguments as for `describe`."""
    identifier = f"{origin.model_name} {finding.name}" + (f" {number}" if number is not None else "")
    return identifier, origin.uid("track", *track)


def report_presence(
    described: Described,
    value: PydicomCode,
    *,
    certainty: sr.Measurement | None = None,
    seen: Sequence[SliceRef] = (),
) -> sr.MeasurementsAndQualitativeEvaluations:
    """A group (TID 1501) that says whether a finding is there, and how certain, without saying where.

    `seen` are the images or frames that it holds for; without any, it holds for all that the report is about.
    """
    images = [
        sr.SourceImageForMeasurementGroup(*uids, frames or None) for uids, frames in frames_by_instance(seen).items()
    ]
    return sr.MeasurementsAndQualitativeEvaluations(
        **described,
        measurements=None if certainty is None else [certainty],
        # CID 240
        qualitative_evaluations=[sr.QualitativeEvaluation(name=codes.DCM.PresenceOfProperty, value=value)],
        source_images=images or None,
    )


def report_absent(subject: Subject, found: Collection[int]) -> list[sr.MeasurementsAndQualitativeEvaluations]:
    """A statement for each class of the manifest that is not among those `found`."""
    absent = sorted(subject.manifest.classes.keys() - set(found))
    return [
        report_presence(describe(subject, subject.meaning(label), "class", str(label)), codes.SCT.Absent)
        for label in absent
    ]


def measure_certainty(score: float, derivation: PydicomCode | None = None) -> sr.Measurement:
    """A model's score, 0 to 1, as CAD reports say it: the certainty that the device places upon a finding, in percent.

    (111012, DCM, "Certainty of Finding"), CID 6048, TID 4006 and 4104. It is no "Probability of cancer", and no
    probability at all before somebody has calibrated the model.
    """
    percent = round(100 * score, 2)
    return PlainMeasurement(codes.DCM.CertaintyOfFinding, value=percent, unit=codes.UCUM.Percent, derivation=derivation)


def source_region(reference: SliceRef) -> sr.SourceImageForRegion:
    """The slice or frame that an image region lies on."""
    frames = None if reference.frame is None else [reference.frame]
    return sr.SourceImageForRegion(reference.sop_class_uid, reference.sop_instance_uid, frames)


def observe(origin: Origin) -> sr.ObserverContext:
    """Who says so: the model in this version of the node (TID 1002, 1004)."""
    return sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=origin.device_uid,
            name=f"radnode {origin.node_version}",
            manufacturer_name=MANUFACTURER,
            model_name=f"{origin.model_name} {origin.model_version}",
            serial_number=origin.model_digest[:16],
        ),
    )


def identify_algorithm(origin: Origin) -> sr.AlgorithmIdentification:
    """The model and all that its result depends on (TID 4019)."""
    return sr.AlgorithmIdentification(
        name=origin.model_name,
        version=origin.model_version,
        family=coded(origin.manifest.algorithm_family),
        parameters=[f"{name}: {value}" for name, value in origin.algorithm_parameters().items()],
        manufacturer=MANUFACTURER,
    )


def round_number(value: float) -> float:
    """A value that a DS holds (16 characters, PS3.5 6.2), rounded the same way everywhere."""
    return float(f"{value:.6g}") if abs(value) < 1000 else round(value, 3)


def _predecessors(origin: Origin, name: str) -> list[Dataset]:
    """The earlier reports in an order of their own; a report that is made again does not replace itself."""
    earlier = {str(report.SOPInstanceUID): report for report in origin.previous}
    return [report for uid, report in sorted(earlier.items()) if uid != origin.uid(name)]


def _check_references(content: Sequence[Dataset], evidence: Sequence[Dataset]) -> None:
    """`ValueError` where an item refers to an instance that the report does not list as its evidence (C.17.2)."""
    known = {str(dataset.SOPInstanceUID) for dataset in evidence}
    waiting = [*content]
    while waiting:
        item = waiting.pop()
        waiting += item.get("ContentSequence") or ()
        for reference in item.get("ReferencedSOPSequence") or ():
            if str(reference.ReferencedSOPInstanceUID) not in known:
                raise ValueError(
                    f"the report refers to {reference.ReferencedSOPInstanceUID}, which is no evidence of it"
                )


def _sites(finding: Finding) -> list[sr.FindingSite] | None:
    if finding.anatomic_region is None and finding.laterality is None:
        return None
    where = finding.anatomic_region or finding.type
    laterality = coded(LATERALITY[finding.laterality]) if finding.laterality else None
    return [sr.FindingSite(coded(where), laterality)]
