"""What each measurement is in coded terms: the concept, the unit, how it was derived and by which method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from highdicom import sr
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from node.dicom.volume import Image, Volume
from node.infer.manifest import DIAMETERS, OF_VALUES, Measurement
from node.report.measure import SegmentMeasurements

_MILLILITRE = Code("mL", "UCUM", "milliliter")
_PIXELS = Code("{pixels}", "UCUM", "Pixels")
_UNITS = {
    "HU": Code("[hnsf'U]", "UCUM", "Hounsfield unit"),
    "SUVbw": Code("g/ml{SUVbw}", "UCUM", "Standardized Uptake Value body weight"),
    "Bq/ml": Code("Bq/ml", "UCUM", "Becquerels/milliliter"),
    "": Code("1", "UCUM", "no units"),
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
    Measurement.PERCENTILE_5: Code("371888009", "SCT", "Fifth percentile"),
    Measurement.PERCENTILE_10: Code("371890005", "SCT", "Tenth percentile"),
    Measurement.PERCENTILE_25: Code("percentile-25", "99RADNODE", "25th percentile"),
    Measurement.PERCENTILE_75: Code("percentile-75", "99RADNODE", "75th percentile"),
    Measurement.PERCENTILE_90: Code("371887004", "SCT", "Ninetieth percentile"),
    Measurement.PERCENTILE_95: Code("371889001", "SCT", "Ninety-fifth percentile"),
}


@dataclass(frozen=True)
class _Shape:
    """A measurement that is known by its own concept."""

    concept: Code
    unit: Code
    method: Code | None = None


_SHAPES = {  # CID 7470, 7471, 7472; methods of CID 7474
    Measurement.VOLUME: _Shape(codes.SCT.Volume, _MILLILITRE, codes.DCM.SumOfSegmentedVoxelMethodForVolume),
    Measurement.MESH_VOLUME: _Shape(codes.IBSI.VolumeOfMesh, _MILLILITRE),
    Measurement.SURFACE_AREA: _Shape(codes.IBSI.SurfaceAreaOfMesh, codes.UCUM.SquareMillimeter),
    Measurement.AREA: _Shape(codes.SCT.Area, codes.UCUM.SquareMillimeter),
    Measurement.LONGEST_DIAMETER: _Shape(codes.SCT.LongAxis, codes.UCUM.Millimeter),
    Measurement.PERPENDICULAR_DIAMETER: _Shape(codes.SCT.ShortAxis, codes.UCUM.Millimeter),
    Measurement.MAXIMUM_3D_DIAMETER: _Shape(codes.IBSI.Maximum3DDiameterOfAMesh, codes.UCUM.Millimeter),
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
            unit = _UNITS[measured.unit]
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


def _unit(measured: SegmentMeasurements, kind: Measurement) -> Code:
    return _PIXELS if measured.unit_of(kind) == "pixels" else _SHAPES[kind].unit


def _quantity(source: Volume | Image) -> Code | None:
    """What the values are (CID 218 Quantitative Image Features); None where no concept says it."""
    if isinstance(source, Volume) and source.unit:
        return _QUANTITIES[source.unit]
    return _ARBITRARY_QUANTITIES.get(source.modality)
