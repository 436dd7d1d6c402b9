"""Probabilities, and what a score came from, as Parametric Maps (PS3.3 A.75, C.8.32; IHE AIR, parametric maps).

Integer maps have 16 bits per voxel (C.8.32.2), which more programs read than floating point; the real world value
mapping says what they stand for. Each object holds one quantity of one finding: programs that know of no channels,
dcmqi and ITK among them, read every one.
"""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
from highdicom.pm import ParametricMap, RealWorldValueMapping
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.codes import Code
from node.dicom.volume import Image
from node.infer.manifest import Finding
from node.infer.results import filled_slices
from node.infer.saliency import Explained, Saliency
from node.report.kinds import Kind
from node.report.seg import coded, stamp
from node.report.slices import refer_to_sources, stand_ins
from node.report.subject import MANUFACTURER, Subject

CERTAIN = 255  # the stored value of a probability of 1
ANATOMICAL_STRUCTURE = Code("SCT", "91723000", "Anatomical Structure")
SIGNED_ZERO = 32767  # the stored value of a drop of 0; 0 and 65534 are -1 and 1


def make_maps(subject: Subject) -> list[Dataset]:
    """A map of probabilities for each segment that the model gave any for, in the order of the manifest's labels.

    A map holds the slices from the first to the last with a probability above 0, as stored values of 1/255. One series
    holds them all; empty where the model gave no probabilities.
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
        mapping = RealWorldValueMapping(
            lut_label=str(number),
            lut_explanation=f"Probability of {segment.name}"[:64],
            unit=codes.UCUM.NoUnits,
            value_range=(0, CERTAIN),
            slope=1 / CERTAIN,
            intercept=0.0,
            quantity_definition=codes.DCM.FractionalProbabilisticSegmentation,  # CID 218
        )
        _say_of_what(mapping, segment)
        maps.append(
            _make(
                subject,
                sources,
                values[first:stop].astype(np.uint16),
                range(first, stop),
                mapping,
                segment,
                window=(CERTAIN / 2, CERTAIN),
                parts=("map", str(label)),
                number=number,
                says=f"probability of {segment.name}",
            )
        )
    return maps


def make_saliency_maps(subject: Subject, saliency: Saliency) -> list[Dataset]:
    """A map of what each explained score came from, by how much it drops where a place is covered, from -1 to 1.

    The quantity is PS3.16 CID 217's Saliency; the mapping's explanation says how it was made. The map must be on the
    subject's own slices: of tilted ones it is brought there as labels are (`saliency_as_sent`).
    """
    sources = stand_ins(subject)
    maps = []
    for number, part in enumerate(saliency.parts, 1):
        finding = subject.meaning(part.label)
        patches = " x ".join(map(str, saliency.patches))
        mapping = RealWorldValueMapping(
            lut_label=str(number),
            lut_explanation=f"Score drop when occluded: {finding.name}"[:64],
            unit=codes.UCUM.NoUnits,
            value_range=(0, 2 * SIGNED_ZERO),
            slope=1 / SIGNED_ZERO,
            intercept=-1.0,
            quantity_definition=codes.DCM.Saliency,
        )
        _say_of_what(mapping, finding)
        frames = range(len(part.drops)) if part.frame is None else range(part.frame, part.frame + 1)
        maps.append(
            _make(
                subject,
                sources,
                _signed(part),
                frames,
                mapping,
                finding,
                window=_window(part),
                parts=("map", "saliency", str(part.label), str(part.frame)),
                number=number,
                says=f"occlusion, {patches} patches, score {part.score:.3f} of {finding.name}",
            )
        )
    return maps


def _make(
    subject: Subject,
    sources: Sequence[Dataset],
    stored: NDArray[np.uint16],
    slices: range,
    mapping: RealWorldValueMapping,
    finding: Finding,
    *,
    window: tuple[float, float],
    parts: tuple[str, ...],
    number: int,
    says: str,
) -> Dataset:
    """One map of `stored` values (slices, rows, columns) on these slices or frames; `sources` stand in for them all."""
    chosen = [sources[index] for index in slices]
    if slices[0]:  # the first one has the patient and the study, the others only their place
        first = sources[0][:]
        first.update({element.tag: element for element in chosen[0]})
        chosen[0] = first
    made = ParametricMap(
        source_images=chosen,
        pixel_array=stored,
        series_instance_uid=subject.uid("map", "series"),
        series_number=subject.series_number(Kind.MAP),
        sop_instance_uid=subject.uid(*parts),
        instance_number=number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=f"{subject.model_name} {subject.model_version}"[:64],
        software_versions=f"radnode {subject.node_version}",
        device_serial_number=subject.model_digest[:16],
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=window[0], window_width=window[1])],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_description=says[:64],
        content_creator_name="radnode^AI",
        content_label="AI_UNVERIFIED",
        content_qualification="RESEARCH",
        series_description=subject.series_description(Kind.MAP),
    )
    refer_to_sources(made, subject)
    _add_anatomy(made, finding)
    if isinstance(subject.source, Image):
        _say_size(made, subject.source)
    stamp(made, subject)
    organization = subject.uid(*parts, "dimensions")
    made.DimensionOrganizationSequence[0].DimensionOrganizationUID = organization
    for item in made.DimensionIndexSequence:
        item.DimensionOrganizationUID = organization
    return made


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


def _say_of_what(mapping: RealWorldValueMapping, finding: Finding) -> None:
    """What it is the quantity of, beside the quantity itself (Quantity Definition Sequence, PS3.3 C.7.6.16.2.11)."""
    said = [(codes.DCM.Finding, finding.type)]
    if finding.anatomic_region:
        said.append((codes.SCT.FindingSite, finding.anatomic_region))
    for name, value in said:
        mapping.QuantityDefinitionSequence.append(hd.sr.CodeContentItem(name=name, value=coded(value)))


def _signed(part: Explained) -> NDArray[np.uint16]:
    return np.rint((np.clip(part.drops, -1, 1) + 1) * SIGNED_ZERO).astype(np.uint16)


def _window(part: Explained) -> tuple[float, float]:
    """From no drop to the largest one: what the score came from is bright, and all else is black."""
    largest = max(float(part.drops.max(initial=0.0)), 1e-3) * SIGNED_ZERO
    return SIGNED_ZERO + largest / 2, largest
