"""The outlines of findings as Softcopy Presentation States (PS3.3 A.33.1, A.33.2; PS3.4 N), for viewers that show
neither SEG nor SR: lines and text over the source images, in a layer per finding that can be switched off.

A presentation state has one modality LUT for all of its images (PS3.3 C.11.1), so images that are rescaled differently,
such as the slices of a PET, are in a presentation state for each rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highdicom as hd
from highdicom import pr
from highdicom.content import ReferencedImageSequence
from PIL import ImageCms
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

from node.dicom.frames import FrameHeaders
from node.dicom.uid import derive_uid
from node.report.annotations import encode_annotations
from node.report.colors import finding_colors
from node.report.encoded import encode_items, with_encoded
from node.report.findings import Findings
from node.report.kinds import Kind
from node.report.outlines import Outline, bound
from node.report.references import refer_to
from node.report.seg import stamp
from node.report.source import complete_header
from node.report.subject import MANUFACTURER, Subject
from node.report.windows import Window, read_modality, read_window, usual_range, window_of


def make_gsps(findings: Findings) -> list[Dataset]:
    """The presentation states of a run: every finding's outline, name and value on the slices and frames that it lies
    on, and the site's banner there; none where the findings have no place.

    Outlines follow pixel edges exactly unless they are too many (`outlines.bound`): then they are within a pixel of
    them, or the smallest are left out; the banner says so. The window is the image's first one, else
    wide enough for what the images hold.
    """
    subject = findings.subject
    outlines, remark = bound(findings.outlines())
    headers = _Headers(subject)
    alike: dict[tuple[object, ...], list[int]] = {}
    for index in sorted({outline.index for outline in outlines}):
        alike.setdefault(() if _is_colour(subject) else _rendering(headers[index]), []).append(index)
    states = []
    for number, indices in enumerate(alike.values(), 1):
        theirs = set(indices)
        drawn = [each for each in outlines if each.index in theirs]
        states.append(_make_state(subject, headers, number, indices, drawn, remark))
    return states


def _is_colour(subject: Subject) -> bool:
    return subject.source.array.ndim == 4


class _Headers:
    """What the image or frame of each slice says of itself."""

    def __init__(self, subject: Subject):
        self._refs = subject.source_slices
        headers = {str(header.SOPInstanceUID): header for header in subject.sources}
        self._frames = {uid: FrameHeaders(headers[uid]) for uid in {ref.sop_instance_uid for ref in self._refs}}

    def __getitem__(self, index: int) -> Dataset:
        ref = self._refs[index]
        return self._frames[ref.sop_instance_uid][ref.frame or 1]


def _rendering(header: Dataset) -> tuple[object, ...]:
    """What has to be alike in the grey images of one presentation state."""
    table = str(header.SOPInstanceUID) if header.get("ModalityLUTSequence") else ""
    return (*read_modality(header), table, header.get("PhotometricInterpretation"))


def _make_state(
    subject: Subject,
    headers: _Headers,
    number: int,
    indices: Sequence[int],
    outlines: Sequence[Outline],
    remark: str,
) -> Dataset:
    """One presentation state of images that are rendered alike; `number` tells it from the others of the run."""
    header = headers[indices[0]]
    images = _stand_ins(subject, indices)
    layers, annotations = _annotate(subject, images, outlines, remark)
    name = f"{subject.model_name} {subject.model_version}"[:64]
    common: dict[str, Any] = {
        "referenced_images": list(images.values()),
        "series_instance_uid": subject.uid("gsps", "series"),
        "series_number": subject.series_number(Kind.GSPS),
        "sop_instance_uid": subject.uid("gsps", str(number)),
        "instance_number": number,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": name,
        "software_versions": f"radnode {subject.node_version}",
        "device_serial_number": subject.model_digest[:16],
        "content_label": "AI_UNVERIFIED",
        "content_description": subject.series_description(Kind.GSPS),
        "content_creator_name": "radnode^AI",
        "graphic_layers": layers,
        "graphic_annotations": annotations,
        "series_description": subject.series_description(Kind.GSPS),
    }
    if _is_colour(subject):
        state: Dataset = pr.ColorSoftcopyPresentationState(**common, icc_profile=_icc_profile(header))
    else:
        slope, intercept, kind = read_modality(header)
        state = pr.GrayscaleSoftcopyPresentationState(
            **common,
            modality_lut_transformation=hd.ModalityLUTTransformation(
                rescale_slope=slope, rescale_intercept=intercept, rescale_type=kind
            ),
            voi_lut_transformations=_windows(subject, headers, images),
            # Photometric Interpretation is ignored: the presentation LUT says the polarity (PS3.4 N.2).
            presentation_lut_transformation=hd.PresentationLUTTransformation(
                presentation_lut_shape="INVERSE"
                if header.get("PhotometricInterpretation") == "MONOCHROME1"
                else "IDENTITY"
            ),
        )
        if tables := header.get("ModalityLUTSequence"):
            _take_table(state, tables[0])
    _refer_to_sources(state, subject, images)
    _show_all(state, header)
    # Type 2C for paired parts of the body (PS3.3 C.7.3.1): the images' own, empty where they say none.
    sides = (header.get("Laterality"), header.get("ImageLaterality"))
    state.Laterality = next((side for side in sides if side in ("L", "R")), None)
    stamp(state, subject)
    state.PresentationCreationDate, state.PresentationCreationTime = state.ContentDate, state.ContentTime
    del state.ContentDate, state.ContentTime  # of no module of presentation states
    character_set = state.get("SpecificCharacterSet")
    rows, columns = subject.source.array.shape[1:3]
    drawings = encode_annotations(
        outlines, lambda index: refer_to([subject.source_slices[index]]), (columns, rows), _layer, character_set
    )
    annotations = encode_items(state.GraphicAnnotationSequence, character_set) + drawings
    return with_encoded(state, {"GraphicAnnotationSequence": annotations})


def _stand_ins(subject: Subject, indices: Sequence[int]) -> dict[int, Dataset]:
    """A single-frame image for each slice or frame; the first has the patient and the study too.

    highdicom 0.28 takes several single-frame images or one multi-frame one, of classes that it knows and with
    functional groups; ultrasound clips have none. So references to the images are put right afterwards.
    """
    first = complete_header(subject.sources[0], subject.says)
    for keyword in ("NumberOfFrames", "TotalPixelMatrixRows", "TotalPixelMatrixColumns"):
        if keyword in first:
            delattr(first, keyword)
    images = {}
    for index in indices:
        image = Dataset()
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            setattr(image, keyword, str(first[keyword].value))
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = derive_uid("stand-in", subject.source_slices[index].sop_instance_uid, str(index))
        image.Rows, image.Columns = subject.source.array.shape[1:3]
        image.SamplesPerPixel = 3 if _is_colour(subject) else 1
        images[index] = image
    # Elements are replaced, not set: they are the source's own.
    first.update({element.tag: element for element in images[indices[0]]})
    return images | {indices[0]: first}


def _refer_to_sources(state: Dataset, subject: Subject, images: dict[int, Dataset]) -> None:
    """Make a presentation state of stand-ins refer to what they stand in for."""
    refs = {str(image.SOPInstanceUID): subject.source_slices[index] for index, image in images.items()}
    for item in (
        *state.ReferencedSeriesSequence,
        *state.GraphicAnnotationSequence,
        *state.get("SoftcopyVOILUTSequence", ()),
    ):
        if "ReferencedImageSequence" in item:
            old = item.ReferencedImageSequence
            item.ReferencedImageSequence = refer_to(refs[str(image.ReferencedSOPInstanceUID)] for image in old)


def _annotate(
    subject: Subject, images: dict[int, Dataset], outlines: Sequence[Outline], remark: str
) -> tuple[list[pr.GraphicLayer], list[pr.GraphicAnnotation]]:
    """A layer per label and one with the banner, and the banner on every image."""
    names = {outline.label: outline.name for outline in outlines}
    colors = finding_colors(subject.manifest)
    banner = pr.GraphicLayer("AI", order=len(names) + 1, description=subject.house.banner[:64])
    layers = {
        label: pr.GraphicLayer(
            _layer(label),
            order=order,
            description=name,
            display_color=hd.color.CIELabColor(*colors[label]),
        )
        for order, (label, name) in enumerate(sorted(names.items()), 1)
    }
    lines = [f"{subject.house.banner}   {subject.model_name} {subject.model_version}", *([remark] if remark else [])]
    annotations = [
        pr.GraphicAnnotation(
            referenced_images=list(images.values()),
            graphic_layer=banner,
            text_objects=[
                pr.TextObject(
                    text_value="\r\n".join(lines)[:1024],
                    units="DISPLAY",
                    bounding_box=(0.0, 0.0, 1.0, 0.04 * len(lines)),
                    text_justification="LEFT",
                )
            ],
        )
    ]
    return [*layers.values(), banner], annotations


def _layer(label: int) -> str:
    return f"AI {label}"


def _windows(subject: Subject, headers: _Headers, images: dict[int, Dataset]) -> list[pr.SoftcopyVOILUTTransformation]:
    """The window of every image, in the values that its modality LUT gives."""
    alike: dict[Window, list[Dataset]] = {}
    usual = None
    for index, image in images.items():
        window = read_window(headers[index])
        if window is None:
            usual = usual or usual_range(subject)
            window = window_of(subject, headers[index], *usual)
        alike.setdefault(window, []).append(image)
    return [
        pr.SoftcopyVOILUTTransformation(
            window_center=window.centre,
            window_width=window.width,
            voi_lut_function=window.function or None,
            referenced_images=ReferencedImageSequence(them) if len(alike) > 1 else None,
        )
        for window, them in alike.items()
    ]


def _take_table(state: Dataset, table: Dataset) -> None:
    """Put a modality LUT's table in place of the rescale. Its VRs depend on the image, which is not there any more."""
    first = table.LUTDescriptor[1]
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", list(table.LUTDescriptor))
    item.add_new("ModalityLUTType", "LO", table.get("ModalityLUTType") or "US")
    data = table["LUTData"]
    item.add_new("LUTData", "OW" if isinstance(data.value, bytes) else "US", data.value)
    del state.RescaleSlope, state.RescaleIntercept, state.RescaleType
    state.ModalityLUTSequence = [item]


def _icc_profile(header: Dataset) -> bytes:
    """The image's own colour space where it says an RGB one, else sRGB, as an input profile (PS3.3 C.11.15.1.1)."""
    own = header.get("ICCProfile")
    if own and own[12:20] in (b"scnrRGB ", b"spacRGB "):
        return bytes(own)
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[12:16] = b"scnr"  # an input profile of matrix and curves has the same tags as a display's (ICC.1 8.3.3)
    profile[24:36] = bytes((7, 234, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0))  # made on 2026-01-01, whenever that is
    return bytes(profile)


def _show_all(state: Dataset, header: Dataset) -> None:
    """The whole image, neither turned nor stretched: pixels of their own height and width (PS3.3 C.10.4)."""
    (shown,) = state.DisplayedAreaSelectionSequence
    del shown.PixelOriginInterpretation  # of tiled images
    spacing = header.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    if spacing and min(spacing) > 0:
        shown.PresentationPixelSpacing = [f"{value:.10g}" for value in spacing]
        del shown.PresentationPixelAspectRatio
    elif ratio := header.get("PixelAspectRatio"):
        shown.PresentationPixelAspectRatio = list(ratio)
