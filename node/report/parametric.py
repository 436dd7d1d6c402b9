"""Probabilities, and what a score came from, as Parametric Maps (PS3.3 A.75, C.8.32; IHE AIR, parametric maps).

Each object holds one quantity of one finding, for programs that know of no channels. Voxels are the quantity itself in
32 bit floating point, which dcmqi 1.5.7 and so 3D Slicer insist on, or 16 bit integers (the least of C.8.32.2),
of half the size and open to lossless compression, whose meaning the real world value mapping gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import highdicom as hd
import numpy as np
from highdicom.pm import ParametricMap, RealWorldValueMapping
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code as PydicomCode
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.codes import Code
from node.dicom.volume import Image
from node.infer.manifest import Finding
from node.infer.results import filled_slices
from node.infer.saliency import Saliency
from node.report.kinds import Kind
from node.report.seg import coded, stamp
from node.report.seg_frames import Place, stream_pixels
from node.report.slices import refer_to_sources, stand_ins
from node.report.subject import MANUFACTURER, Subject

Form = Literal["float", "integer"]

CERTAIN = 255  # the stored value of a probability of 1 in an integer map
ANATOMICAL_STRUCTURE = Code("SCT", "91723000", "Anatomical Structure")
SIGNED_ZERO = 32767  # the stored value of a drop of 0 in an integer map; 0 and 65534 are -1 and 1


def make_maps(subject: Subject, form: Form = "float") -> list[Dataset]:
    """A map of probabilities, 0 to 1, for each segment that the model gave any for, in the order of its labels.

    A map holds the slices from the first to the last with a probability above 0. One series holds them all; the list is
    empty where the model gave no probabilities.
    """
    found = subject.labelmap.probabilities or {}
    sources = stand_ins(subject) if found else ()
    maps = []
    for number, label in enumerate(sorted(subject.manifest.segments), 1):
        values = found.get(label)
        first, stop = filled_slices(values) if values is not None else (0, 0)
        if values is None or first == stop:
            continue
        segment = subject.manifest.segments[label]
        whole = values[first:stop].astype(np.uint16)
        quantity = _Quantity(
            finding=segment,
            code=codes.DCM.FractionalProbabilisticSegmentation,  # CID 218
            explanation=f"Probability of {segment.name}",
            values=whole if form == "integer" else (whole / np.float32(CERTAIN)).astype(np.float32),
            ends=(0, CERTAIN) if form == "integer" else (0.0, 1.0),
            slope=1 / CERTAIN if form == "integer" else 1.0,
            intercept=0.0,
            shown=(0, CERTAIN) if form == "integer" else (0.0, 1.0),
        )
        says = f"probability of {segment.name}"
        made = _make(subject, sources, quantity, range(first, stop), ("map", str(label)), number, says)
        if form == "float":
            _stream(made, values[first:stop].copy())
        maps.append(made)
    return maps


class _Fractions:
    """Probabilities as they are written, four bytes of each one."""

    bits = 32

    def __init__(self, values: NDArray[np.uint8]):
        """`values` are (slices, rows, columns), `CERTAIN` for a probability of 1."""
        self.pixels = values.shape[1] * values.shape[2]
        self.present = np.ones((len(values), 1), bool)
        self._values = values

    def encode(self, places: Sequence[Place]) -> bytes:
        """32 bits per pixel."""
        return b"".join((self._values[place.slice] / np.float32(CERTAIN)).astype("<f4").tobytes() for place in places)


def _stream(made: Dataset, values: NDArray[np.uint8]) -> None:
    """Let the pixels of a map be made while it is written: those of a hundred segments at once take 40 GB."""
    planes = _Fractions(values)
    pixels = stream_pixels(planes, [Place(index, 0) for index in range(len(values))])
    tag = Tag("FloatPixelData")
    made[tag] = DataElement(tag, "OF", pixels)


def make_saliency_maps(subject: Subject, saliency: Saliency, form: Form = "float") -> list[Dataset]:
    """A map of what each explained score came from: by how much it drops where a place is covered, from -1 to 1.

    The quantity is PS3.16 CID 217's Saliency; its explanation says how it was made. `saliency` must be on the slices of
    the subject (`node.infer.regular.saliency_as_sent`).
    """
    sources = stand_ins(subject)
    maps = []
    for number, part in enumerate(saliency.parts, 1):
        finding = subject.meaning(part.label)
        drops = np.clip(part.drops, -1, 1).astype(np.float32)
        # Shown from no drop to the largest one: what the score came from is bright, and all else is black.
        largest = max(float(drops.max(initial=0.0)), 1e-3)
        quantity = _Quantity(
            finding=finding,
            code=codes.DCM.Saliency,
            explanation=f"Score drop when occluded: {finding.name}",
            values=np.rint((drops + 1) * SIGNED_ZERO).astype(np.uint16) if form == "integer" else drops,
            ends=(0, 2 * SIGNED_ZERO) if form == "integer" else (-1.0, 1.0),
            slope=1 / SIGNED_ZERO if form == "integer" else 1.0,
            intercept=-1.0 if form == "integer" else 0.0,
            shown=(SIGNED_ZERO, SIGNED_ZERO * (1 + largest)) if form == "integer" else (0.0, largest),
        )
        frames = range(len(drops)) if part.frame is None else range(part.frame, part.frame + 1)
        parts = ("map", "saliency", str(part.label), str(part.frame))
        patches = " x ".join(map(str, saliency.patches))
        says = f"occlusion, {patches} patches, score {part.score:.3f} of {finding.name}"
        maps.append(_make(subject, sources, quantity, frames, parts, number, says))
    return maps


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """Values (slices, rows, columns) as they are stored, and what they stand for."""

    finding: Finding
    code: PydicomCode
    explanation: str
    values: NDArray[np.uint16] | NDArray[np.float32]
    ends: tuple[int, int] | tuple[float, float]  # the least and the greatest value that may be stored
    slope: float  # stored value times this, plus ...
    intercept: float  # ... this is the quantity
    shown: tuple[float, float]  # stored values that are black and white

    def mapping(self, number: int) -> RealWorldValueMapping:
        """Of what, beside the quantity itself, stands in the Quantity Definition Sequence (PS3.3 C.7.6.16.2.11)."""
        made = RealWorldValueMapping(
            lut_label=str(number),
            lut_explanation=self.explanation[:64],
            unit=codes.UCUM.NoUnits,
            value_range=self.ends,
            slope=self.slope,
            intercept=self.intercept,
            quantity_definition=self.code,
        )
        said = [(codes.DCM.Finding, self.finding.type)]
        if self.finding.anatomic_region:
            said.append((codes.SCT.FindingSite, self.finding.anatomic_region))
        for name, value in said:
            made.QuantityDefinitionSequence.append(hd.sr.CodeContentItem(name=name, value=coded(value)))
        return made

    def window(self) -> hd.VOILUTTransformation:
        """From black to white, exactly: the usual function ends half a step before its ends (PS3.3 C.11.2.1.3.2)."""
        low, high = self.shown
        return hd.VOILUTTransformation(
            window_center=(low + high) / 2, window_width=high - low, voi_lut_function="LINEAR_EXACT"
        )


def _make(
    subject: Subject,
    sources: Sequence[Dataset],
    quantity: _Quantity,
    slices: range,
    parts: tuple[str, ...],
    number: int,
    says: str,
) -> Dataset:
    """One map on these slices or frames of the source; `sources` stand in for all of them."""
    chosen = [sources[index] for index in slices]
    if slices[0]:  # the first one of all has the patient and the study, the others only their place
        first = sources[0][:]
        first.update({element.tag: element for element in chosen[0]})
        chosen[0] = first
    made = ParametricMap(
        source_images=chosen,
        pixel_array=quantity.values,
        series_instance_uid=subject.uid("map", "series"),
        series_number=subject.series_number(Kind.MAP),
        sop_instance_uid=subject.uid(*parts),
        instance_number=number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[quantity.mapping(number)],
        voi_lut_transformations=[quantity.window()],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_description=says[:64],
        content_creator_name="radnode^AI",
        content_label="AI_UNVERIFIED",
        content_qualification="RESEARCH",
        series_description=subject.series_description(Kind.MAP),
    )
    _put_in_order(made, [str(source.SOPInstanceUID) for source in chosen])
    refer_to_sources(made, subject)
    _add_anatomy(made, quantity.finding)
    if isinstance(subject.source, Image):
        _say_size(made, subject.source)
    stamp(made, subject)
    organization = subject.uid(*parts, "dimensions")
    made.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
    return made


def _put_in_order(made: Dataset, uids: Sequence[str]) -> None:
    """The frames in the order of the source, along the slices' normal.

    highdicom 0.28 puts some stacks against it, and dcmqi takes the order of the frames for that of their positions.
    """
    groups = list(made.PerFrameFunctionalGroupsSequence)
    found = [
        uids.index(str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID))
        for group in groups
    ]
    if found == sorted(found):
        return
    order = sorted(range(len(found)), key=found.__getitem__)
    keyword = "FloatPixelData" if "FloatPixelData" in made else "PixelData"
    pixels: bytes = made[keyword].value
    size = len(pixels) // len(found)  # both are of an even number of bytes per frame, so nothing is padded
    made[keyword].value = b"".join(pixels[index * size : (index + 1) * size] for index in order)
    made.PerFrameFunctionalGroupsSequence = [groups[index] for index in order]
    for number, group in enumerate(made.PerFrameFunctionalGroupsSequence, 1):
        group.FrameContentSequence[0].DimensionIndexValues = number


def _add_anatomy(made: Dataset, finding: Finding) -> None:
    """What part of the body the frames are of (Frame Anatomy, PS3.3 C.7.6.16.2.8); dcmqi 1.5.7 crashes without it."""
    region = finding.anatomic_region or (finding.type if finding.category == ANATOMICAL_STRUCTURE else None)
    item = Dataset()
    item.FrameLaterality = {"left": "L", "right": "R", "both": "B"}.get(finding.laterality or "", "U")
    item.AnatomicRegionSequence = [coded(region) if region else hd.sr.CodedConcept.from_code(codes.SCT.Tissue)]
    (shared,) = made.SharedFunctionalGroupsSequence
    shared.FrameAnatomySequence = [item]


def _say_size(made: Dataset, image: Image) -> None:
    """The size of an image's pixels where it is known.

    Unlike a SEG, a map must have a frame of reference, plane positions and pixel measures (PS3.3 A.75.3, A.75.4): that
    of a planar image has a space of its own, in which frames lie 1 apart, and pixels too where nobody knows their size.
    """
    if image.spacing_mm is None:
        return
    (shared,) = made.SharedFunctionalGroupsSequence
    (measures,) = shared.PixelMeasuresSequence
    measures.PixelSpacing = [f"{value:.10g}" for value in image.spacing_mm]
