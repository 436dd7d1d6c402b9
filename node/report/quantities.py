"""What each measurement is in coded terms: the concept, the unit, how it was derived and by which method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from highdicom import sr
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode

from node.dicom.codes import Code
from node.dicom.volume import Image, Volume
from node.infer.manifest import DIAMETERS, OF_VALUES, Measurement
from node.report.measure import SegmentMeasurements
from node.report.seg import coded

_MILLILITRE = Code("UCUM", "mL", "milliliter")
_PIXELS = Code("UCUM", "{pixels}", "Pixels")
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
    "CR": codes.DCM.XRayAttenuation,
    "DX": codes.DCM.XRayAttenuation,
    "MG": codes.DCM.XRayAttenuation,
    "RF": codes.DCM.XRayAttenuation,
    "XA": codes.DCM.XRayAttenuation,
    "MR": codes.DCM.MRSignalIntensity,
    "NM": codes.DCM.NuclearMedicineTomographicActivity,
    "PT": codes.DCM.NuclearMedicineTomographicActivity,
    "US": codes.DCM.Echogenicity,
}
# CID 7464, which has the median only of what divides values by rank; the other percentiles that SNOMED CT has are those
# whose codes CID 7465 has for populations. It has no quartiles, so these two are radnode's own.
_DERIVATIONS = {
    Measurement.MEAN: codes.SCT.Mean,
    Measurement.STANDARD_DEVIATION: codes.SCT.StandardDeviation,
    Measurement.MINIMUM: codes.SCT.Minimum,
    Measurement.MAXIMUM: codes.SCT.Maximum,
    Measurement.MEDIAN: codes.SCT.Median,
    Measurement.PERCENTILE_5: PydicomCode("371888009", "SCT", "Fifth percentile"),
    Measurement.PERCENTILE_10: PydicomCode("371890005", "SCT", "Tenth percentile"),
    Measurement.PERCENTILE_25: PydicomCode("percentile-25", "99RADNODE", "25th percentile"),
    Measurement.PERCENTILE_75: PydicomCode("percentile-75", "99RADNODE", "75th percentile"),
    Measurement.PERCENTILE_90: PydicomCode("371887004", "SCT", "Ninetieth percentile"),
    Measurement.PERCENTILE_95: PydicomCode("371889001", "SCT", "Ninety-fifth percentile"),
}


@dataclass(frozen=True)
class _Shape:
    """A measurement that is known by its own concept."""

    concept: PydicomCode
    unit: Code
    method: PydicomCode | None = None


_MILLIMETRE = Code("UCUM", "mm", "millimeter")
_SQUARE_MILLIMETRE = Code("UCUM", "mm2", "square millimeter")
_SHAPES = {  # CID 7470, 7471, 7472; methods of CID 7474
    Measurement.VOLUME: _Shape(codes.SCT.Volume, _MILLILITRE, codes.DCM.SumOfSegmentedVoxelMethodForVolume),
    Measurement.MESH_VOLUME: _Shape(codes.IBSI.VolumeOfMesh, _MILLILITRE),
    Measurement.SURFACE_AREA: _Shape(codes.IBSI.SurfaceAreaOfMesh, _SQUARE_MILLIMETRE),
    Measurement.AREA: _Shape(codes.SCT.Area, _SQUARE_MILLIMETRE),
    Measurement.LONGEST_DIAMETER: _Shape(codes.SCT.LongAxis, _MILLIMETRE),
    Measurement.PERPENDICULAR_DIAMETER: _Shape(codes.SCT.ShortAxis, _MILLIMETRE),
    Measurement.MAXIMUM_3D_DIAMETER: _Shape(codes.IBSI.Maximum3DDiameterOfAMesh, _MILLIMETRE),
}


def code_measurements(source: Volume | Image, measured: SegmentMeasurements) -> Iterator[sr.Measurement]:
    """The wanted measurements that have a value and a concept that says what was measured (TID 1419)."""
    quantity = _quantity(source)
    for kind in measured.wanted:
        value = measured.value(kind)
        if value is None:
            continue
        if kind not in OF_VALUES:
            shape = _SHAPES[kind]
            yield sr.Measurement(shape.concept, value=value, unit=_unit(measured, kind), method=shape.method)
        elif quantity is not None:
            unit = coded(_UNITS[measured.unit])
            yield sr.Measurement(quantity, value=value, unit=unit, derivation=_DERIVATIONS[kind])


def code_diameters(measured: SegmentMeasurements, image: sr.SourceImageForRegion) -> list[sr.Measurement]:
    """The wanted diameters, each with its line on the slice or frame that it was measured on (TID 300)."""
    found = measured.diameters
    if found is None:
        return []
    lines = dict(zip(DIAMETERS, (found.longest_line, found.perpendicular_line), strict=True))
    coded_lines = []
    for kind, line in lines.items():
        value = measured.value(kind)
        if kind in measured.wanted and value is not None:
            coordinates = sr.CoordinatesForMeasurement(
                graphic_type=sr.GraphicTypeValues.POLYLINE,
                # Columns first, counted from the first pixel's corner (PS3.3 C.18.6.1).
                graphic_data=line[:, ::-1] + 0.5,
                source_image=image,
            )
            unit = _unit(measured, kind)
            coded_lines.append(
                sr.Measurement(_SHAPES[kind].concept, value=value, unit=unit, referenced_coordinates=[coordinates])
            )
    return coded_lines


def _unit(measured: SegmentMeasurements, kind: Measurement) -> sr.CodedConcept:
    return coded(_PIXELS if measured.unit_of(kind) == "pixels" else _SHAPES[kind].unit)


def _quantity(source: Volume | Image) -> PydicomCode | None:
    """What the values are (CID 218 Quantitative Image Features); None where no concept says it."""
    if isinstance(source, Volume) and source.unit:
        return _QUANTITIES[source.unit]
    return _ARBITRARY_QUANTITIES.get(source.modality)
