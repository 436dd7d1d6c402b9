"""What is reported of a label map: a SEG, measurements of each segment, sections with the segments drawn over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode

from node.dicom.codes import Code
from node.dicom.volume import Volume
from node.infer.manifest import Measurement
from node.report.measure import SegmentMeasurements, measure_segments
from node.report.page import Line, Panel
from node.report.sections import AXIAL_PANELS, show_frames, show_section, spread
from node.report.seg import coded, make_seg, tracking
from node.report.space import add_key_point, key_voxels
from node.report.sr import Described, Group, describe, report_presence, round_number
from node.report.subject import Subject

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
_DERIVATIONS = {
    Measurement.MEAN: codes.SCT.Mean,
    Measurement.STANDARD_DEVIATION: codes.SCT.StandardDeviation,
    Measurement.MINIMUM: codes.SCT.Minimum,
    Measurement.MAXIMUM: codes.SCT.Maximum,
}


class SegmentFindings:
    """The findings of a label map."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.measurements: Sequence[SegmentMeasurements] = measure_segments(
            subject.volume, subject.labelmap, subject.manifest
        )

    def objects(self) -> dict[str, Dataset]:
        """The SEG, when anything was found: one without frames is not valid (PS3.3 C.7.6.16)."""
        if not any(measured.voxels for measured in self.measurements):
            return {}
        return {"seg": make_seg(self.subject)}

    def groups(self, objects: dict[str, Dataset]) -> list[Group]:
        """A measurement group per segment that was found; a segment that was not found is said so."""
        numbers = [measured.number for measured in self.measurements]
        places = key_voxels(self.subject.labelmap.array, numbers)
        found = [
            _measure(self.subject, number, measured, objects["seg"], places[measured.number])
            for number, measured in enumerate(self.measurements, 1)
            if measured.voxels
        ]
        absent = [
            report_presence(_described(self.subject, measured.number), codes.SCT.Absent)
            for measured in self.measurements
            if not measured.voxels
        ]
        return [*found, *absent]

    def panels(self) -> list[Panel]:
        """Axial slices across the segments, then a coronal and a sagittal section through their middle."""
        source, labels = self.subject.source, self.subject.labelmap.array
        occupied = np.flatnonzero(labels.any(axis=(1, 2)))
        first, last = (int(occupied[0]), int(occupied[-1])) if occupied.size else (0, labels.shape[0] - 1)
        if not isinstance(source, Volume):
            return show_frames(source, spread(first, last, AXIAL_PANELS + 2), labels)
        panels = [show_section(source, 0, index, labels) for index in spread(first, last, AXIAL_PANELS)[::-1]]
        if labels.any():
            weight = labels > 0
            row = int(np.average(np.arange(labels.shape[1]), weights=weight.sum((0, 2))))
            # A column through the larger half, not through the gap between two lungs.
            column = int(np.argmax(weight.sum((0, 1))))
        else:
            row, column = labels.shape[1] // 2, labels.shape[2] // 2
        return [*panels, show_section(source, 1, row, labels), show_section(source, 2, column, labels)]

    def lines(self) -> list[Line]:
        """Each segment with its measurements."""
        lines = []
        for measured in self.measurements:
            parts = [f"{row['measurement']} {row['value']:.1f} {row['unit']}".strip() for row in measured.rows()]
            text = "   ".join(parts) if measured.voxels else "not found"
            lines.append(Line(measured.number, f"{measured.name}:  {text}"))
        return lines


def _described(subject: Subject, label: int) -> Described:
    """A segment's description with the tracking that its SEG has."""
    identifier, uid = tracking(subject, label)
    described = describe(subject, subject.manifest.segments[label], str(label))
    return {**described, "tracking_identifier": sr.TrackingIdentifier(uid=uid, identifier=identifier)}


def _measure(
    subject: Subject, number: int, measured: SegmentMeasurements, seg: Dataset, place: tuple[int, int, int]
) -> Group:
    group = sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        **_described(subject, measured.number),
        referenced_segment=sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=sr.SourceSeriesForSegmentation(subject.source.series_uid),
        ),
        measurements=list(_measurements(subject.volume, measured)),
    )
    index, row, column = place
    add_key_point(group, subject.source_slices[index], row, column)
    return group


def _measurements(volume: Volume, measured: SegmentMeasurements) -> Iterator[sr.Measurement]:
    """The wanted measurements that have a value and a concept that says what was measured."""
    quantity = _quantity(volume)
    for kind in measured.wanted:
        value = measured.value(kind)
        if value is None:
            continue
        if kind is Measurement.VOLUME:
            unit = sr.CodedConcept("mL", "UCUM", "milliliter")
            yield sr.Measurement(name=codes.SCT.Volume, value=round_number(value), unit=unit)
        elif quantity is not None:
            unit = coded(_UNITS[volume.unit])
            yield sr.Measurement(quantity, value=round_number(value), unit=unit, derivation=_DERIVATIONS[kind])


def _quantity(volume: Volume) -> PydicomCode | None:
    """What the voxel values are (CID 218 Quantitative Image Features); None where no concept says it."""
    if volume.unit:
        return _QUANTITIES[volume.unit]
    return _ARBITRARY_QUANTITIES.get(volume.modality)
