"""Measurements as a Structured Report: Comprehensive 3D SR after TID 1500 (PS3.16), referring to the SEG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from highdicom import sr
from highdicom.seg import Segmentation
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode

from node.dicom.codes import LATERALITY, Code
from node.dicom.volume import Volume
from node.infer.manifest import Measurement, Segment
from node.report.measure import SegmentMeasurements
from node.report.seg import coded, stamp, tracking
from node.report.source import complete_header
from node.report.subject import MANUFACTURER, Subject

_UNITS = {
    "HU": Code("UCUM", "[hnsf'U]", "Hounsfield unit"),
    "SUVbw": Code("UCUM", "g/ml{SUVbw}", "Standardized Uptake Value body weight"),
    "Bq/ml": Code("UCUM", "Bq/ml", "Becquerels/milliliter"),
    "": Code("UCUM", "1", "no units"),
}
_QUANTITIES = {
    "HU": codes.DCM.AttenuationCoefficient,
    "SUVbw": codes.DCM.Suvbw,
    "Bq/ml": codes.DCM.NuclearMedicineTomographicActivity,
}
_ARBITRARY_QUANTITIES = {  # by modality, for values without a unit
    "CT": codes.DCM.XRayAttenuation,
    "MR": codes.DCM.MRSignalIntensity,
    "PT": codes.DCM.NuclearMedicineTomographicActivity,
    "NM": codes.DCM.NuclearMedicineTomographicActivity,
}
_PROCEDURES = {
    "CT": codes.LN.CTUnspecifiedBodyRegion,
    "MR": codes.LN.MRIUnspecifiedBodyRegion,
    "PT": codes.LN.PETUnspecifiedBodyRegion,
}
_SOURCE = Code("SCT", "260753009", "Source")
_POSITION = (codes.DCM.ImagePositionPatientX, codes.DCM.ImagePositionPatientY, codes.DCM.ImagePositionPatientZ)
_DERIVATIONS = {
    Measurement.MEAN: codes.SCT.Mean,
    Measurement.STANDARD_DEVIATION: codes.SCT.StandardDeviation,
    Measurement.MINIMUM: codes.SCT.Minimum,
    Measurement.MAXIMUM: codes.SCT.Maximum,
}


def make_sr(
    subject: Subject, measurements: Sequence[SegmentMeasurements], seg: Segmentation | None
) -> sr.Comprehensive3DSR:
    """The report of a run: a measurement group per segment that was found; a segment that was not found is said so.

    `seg` is the segmentation that the groups refer to; None when nothing was found.
    """
    sources = [complete_header(source) for source in subject.sources]
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                    uid=subject.device_uid,
                    name=f"radnode {subject.node_version}",
                    manufacturer_name=MANUFACTURER,
                    model_name=f"{subject.model_name} {subject.model_version}",
                    serial_number=subject.model_digest[:16],
                ),
            )
        ),
        # CID 100: the modality's own term; which region, the codes of the segments say.
        procedure_reported=_PROCEDURES.get(subject.volume.modality, codes.SCT.ImagingProcedure),
        imaging_measurements=[
            _measure(subject, number, measured, seg)
            for number, measured in enumerate(measurements, 1)
            if measured.voxels and seg is not None
        ]
        + [_absent(subject, measured) for measured in measurements if not measured.voxels],
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(
            sr.CodedConcept("en", "RFC5646", "English")
        ),
        referenced_images=sources[:1],
    )
    _share_descriptors(report, sources)
    document = sr.Comprehensive3DSR(
        evidence=sources if seg is None else [*sources, seg],
        content=report,
        series_instance_uid=subject.uid("sr", "series"),
        series_number=subject.series_number + 1,
        sop_instance_uid=subject.uid("sr"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,  # preliminary: nobody has read it
        is_verified=False,
        series_description=subject.series_description,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
    )
    stamp(document, subject)
    del document.SeriesDate, document.SeriesTime  # of the SR Document Series module (PS3.3 C.17.1) neither is part
    return document


def _share_descriptors(report: sr.MeasurementReport, sources: Sequence[Dataset]) -> None:
    """Describe the images of the library once, for their group (TID 1601 row 2), and list them all below.

    highdicom describes each image by itself, 15 items with its position too: for 384 slices 1.7 MB and 8 s. What an
    image's position is, the image itself says.
    """
    (library,) = (item for item in report[0].ContentSequence if item.name == codes.DCM.ImageLibrary)
    (group,) = library.ContentSequence
    (first,) = group.ContentSequence
    differing = set(_POSITION)
    if len({source.get("SliceThickness") for source in sources}) > 1:
        differing.add(codes.DCM.SliceThickness)
    shared = [item for item in first.ContentSequence if item.name not in differing]
    entries = [
        sr.ImageContentItem(
            name=coded(_SOURCE),
            referenced_sop_class_uid=source.SOPClassUID,
            referenced_sop_instance_uid=source.SOPInstanceUID,
            relationship_type=sr.RelationshipTypeValues.CONTAINS,
        )
        for source in sources
    ]
    group.ContentSequence = sr.ContentSequence([*shared, *entries])


def _measure(
    subject: Subject, number: int, measured: SegmentMeasurements, seg: Segmentation | None
) -> sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    assert seg is not None
    segment = subject.manifest.segments[measured.number]
    identifier, uid = tracking(subject, measured.number)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=uid, identifier=identifier),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(subject.volume.series_uid),
        ),
        finding_type=coded(segment.type),
        finding_category=coded(segment.category),
        finding_sites=_sites(segment),
        algorithm_id=_algorithm(subject),
        measurements=list(_measurements(subject.volume, measured)),
    )


def _measurements(volume: Volume, measured: SegmentMeasurements) -> Iterator[sr.Measurement]:
    """The wanted measurements that have a value and a concept that says what was measured."""
    quantity = _quantity(volume)
    for kind in measured.wanted:
        value = measured.value(kind)
        if value is None:
            continue
        if kind is Measurement.VOLUME:
            unit = sr.CodedConcept("mL", "UCUM", "milliliter")
            yield sr.Measurement(name=codes.SCT.Volume, value=_decimal(value), unit=unit)
        elif quantity is not None:
            unit = coded(_UNITS[volume.unit])
            yield sr.Measurement(quantity, value=_decimal(value), unit=unit, derivation=_DERIVATIONS[kind])


def _quantity(volume: Volume) -> PydicomCode | None:
    """What the voxel values are (CID 218 Quantitative Image Features); None where no concept says it."""
    if volume.unit:
        return _QUANTITIES[volume.unit]
    return _ARBITRARY_QUANTITIES.get(volume.modality)


def _decimal(value: float) -> float:
    """A value that a DS holds (16 characters, PS3.5 6.2), rounded the same way everywhere."""
    return float(f"{value:.6g}") if abs(value) < 1000 else round(value, 3)


def _absent(subject: Subject, measured: SegmentMeasurements) -> sr.MeasurementsAndQualitativeEvaluations:
    """A segment that the model looked for and did not find."""
    segment = subject.manifest.segments[measured.number]
    identifier, uid = tracking(subject, measured.number)
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=uid, identifier=identifier),
        finding_type=coded(segment.type),
        finding_category=coded(segment.category),
        finding_sites=_sites(segment),
        algorithm_id=_algorithm(subject),
        qualitative_evaluations=[
            sr.QualitativeEvaluation(
                name=codes.DCM.PresenceOfProperty,
                value=codes.SCT.Absent,  # CID 240
            )
        ],
    )


def _sites(segment: Segment) -> list[sr.FindingSite] | None:
    if segment.anatomic_region is None and segment.laterality is None:
        return None
    where = segment.anatomic_region or segment.type
    laterality = coded(LATERALITY[segment.laterality]) if segment.laterality else None
    return [sr.FindingSite(coded(where), laterality)]


def _algorithm(subject: Subject) -> sr.AlgorithmIdentification:
    return sr.AlgorithmIdentification(
        name=subject.model_name,
        version=subject.model_version,
        family=coded(subject.manifest.algorithm_family),
        parameters=[f"{name}: {value}" for name, value in subject.algorithm_parameters().items()],
        manufacturer=MANUFACTURER,
    )
