"""Pictures as Secondary Capture images (PS3.3 A.8.1): the page and the overlay's images have this in common.

Their modality is OT and not that of the source. A hanging protocol for CT then never takes a page for a scan, a route
that asks for CT (radnode's own among them) never feeds a result back to a model, and viewers list the series as what it
is. They are uncompressed here; compression is a matter of the destination.
"""

from __future__ import annotations

from collections.abc import Iterable

import highdicom as hd
import numpy as np
from highdicom.sc import SCImage
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from node.dicom.volume import SliceRef
from node.report.kinds import Kind
from node.report.quiet import quietly
from node.report.references import refer_to
from node.report.seg import stamp
from node.report.source import complete_header
from node.report.subject import MANUFACTURER, Origin

# What scanners of these make has no text in its pixels unless they say so.
_WITHOUT_TEXT = ("CT", "MR", "PT")


def capture(
    origin: Origin,
    picture: Image.Image,
    kind: Kind,
    *,
    uid: str,
    series_uid: str,
    number: int = 1,
    refs: Iterable[SliceRef] = (),
    derivation: str,
    description: str = "",
) -> Dataset:
    """An RGB picture as a Secondary Capture image of the origin's study.

    `refs` are the source images that it shows or was made of, `number` is its instance number, `derivation` says in a
    sentence how it was made, `description` is that of the series, where it is not the usual one.
    """
    header = complete_header(origin.sources[0], origin.says)
    model = origin.model[:64]
    with quietly():
        image = SCImage.from_ref_dataset(
            header,
            pixel_array=np.asarray(picture.convert("RGB")),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # highdicom wants one; the picture's own is set below
            series_instance_uid=series_uid,
            series_number=origin.series_number(kind),
            series_description=description or origin.series_description(kind),
            sop_instance_uid=uid,
            instance_number=number,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=model,
            software_versions=f"radnode {origin.node_version}",
            device_serial_number=origin.model_digest[:16],
            transfer_syntax_uid=ExplicitVRLittleEndian,
            contributing_equipment=[
                hd.ContributingEquipment(
                    MANUFACTURER,
                    codes.DCM.ProcessingEquipment,
                    manufacturer_model_name=model,
                    software_versions=f"radnode {origin.node_version}",
                    device_serial_number=origin.model_digest[:16],
                    contribution_description=f"AI model, package SHA-256 {origin.model_digest}",
                )
            ],
        )
    _complete(image, origin, header)
    image.DerivationDescription = derivation[:1024]
    if references := refer_to(refs):
        image.SourceImageSequence = references
    return image


def _complete(image: Dataset, origin: Origin, header: Dataset) -> None:
    """What highdicom says otherwise, or not at all."""
    image.PatientOrientation = None  # Type 2C: a page has none
    side = header.get("Laterality") or header.get("ImageLaterality")
    image.Laterality = side if side in ("L", "R") else None  # Type 2C: unknown
    image.ConversionType = "WSD"  # Workstation (PS3.3 C.8.6.1)
    image.ImageType = ["DERIVED", "SECONDARY"]
    if burned_in := _burned_in(origin):
        image.BurnedInAnnotation = burned_in
    stamp(image, origin)  # pyright: ignore[reportArgumentType]
    image.DateOfSecondaryCapture, image.TimeOfSecondaryCapture = image.ContentDate, image.ContentTime


def _burned_in(origin: Origin) -> str | None:
    """YES or NO where it is known whether the pixels identify the patient: what is drawn over them never does."""
    said = {str(source.get("BurnedInAnnotation") or "").strip().upper() for source in origin.sources}
    if "YES" in said:
        return "YES"
    plain = all(source.get("Modality") in _WITHOUT_TEXT for source in origin.sources)
    return "NO" if said == {"NO"} or plain else None
