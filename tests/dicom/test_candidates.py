"""What an instance can be: slides, clips and tomographies of many frames, and what is left aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset

from node.dicom.assembly import Assembly, assemble_volumes
from node.dicom.header import read_header, scan_folder
from tests.dicom.multiframe import write_multiframe
from tests.dicom.slices import write_series


def assemble(folder: Path) -> Assembly:
    return assemble_volumes({path: read_header(path) for path in scan_folder(folder).files})


def header_of(**values: Any) -> Dataset:
    dataset = Dataset()
    everything = {
        "SOPInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2",
        "Rows": 8,
        "Columns": 9,
        **values,
    }
    for keyword, value in everything.items():
        setattr(dataset, keyword, value)
    return dataset


def slide(kind: str, uid: str) -> Dataset:
    measures = header_of(PixelSpacing=["0.0005", "0.0005"])
    return header_of(
        SOPClassUID=uids.VLWholeSlideMicroscopyImageStorage, SOPInstanceUID=uid, Modality="SM", NumberOfFrames="12",
        ImageType=["ORIGINAL", "PRIMARY", kind, "NONE"], SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL_422",
        DimensionOrganizationType="TILED_FULL", InstanceNumber=1,
        SharedFunctionalGroupsSequence=[header_of(PixelMeasuresSequence=[measures])],
    )  # fmt: skip


def test_tiles_of_a_slide_without_its_label() -> None:
    kinds = ["VOLUME", "LABEL", "OVERVIEW", "THUMBNAIL"]
    headers = {Path(kind): slide(kind, f"1.2.{number}") for number, kind in enumerate(kinds)}
    assembly = assemble_volumes(headers)
    (image,) = assembly.images
    assert (image.shape, image.colour, image.modality) == ((12, 8, 9), True, "SM")
    assert [ref.frame for ref in image.frames] == list(range(1, 13))
    assert list(image.header.PixelSpacing) == [0.0005, 0.0005]
    assert "SharedFunctionalGroupsSequence" in image.header
    assert sorted(refusal.sentence for refusal in assembly.refusals) == [
        "ImageType says LABEL", "ImageType says OVERVIEW", "ImageType says THUMBNAIL",
    ]  # fmt: skip


def test_images_of_a_series_are_numbered_in_its_order() -> None:
    headers = {
        Path(uid): header_of(
            SOPClassUID=uids.DigitalXRayImageStorageForPresentation, SOPInstanceUID=uid, InstanceNumber=number
        )
        for uid, number in (("1.2.1", 3), ("1.2.2", 1), ("1.2.3", 2), ("1.2.4", 2))
    }
    images = assemble_volumes(headers).images
    assert [(image.name, str(image.paths[0])) for image in images] == [
        ("image 1", "1.2.2"), ("image 2", "1.2.3"), ("image 3", "1.2.4"), ("image 4", "1.2.1"),
    ]  # fmt: skip
    assert all(image.frames[0].frame is None and not image.colour for image in images)


def test_colour_by_a_table_is_colour() -> None:
    header = header_of(SOPClassUID=uids.UltrasoundImageStorage, PhotometricInterpretation="PALETTE COLOR")
    assert assemble_volumes({Path("us"): header}).images[0].colour


def test_projection_radiograph_with_a_position_stays_an_image() -> None:
    header = header_of(
        SOPClassUID=uids.XRayAngiographicImageStorage, ImagePositionPatient=["0", "0", "0"],
        ImageOrientationPatient=["1", "0", "0", "0", "1", "0"], PixelSpacing=["1", "1"], NumberOfFrames="5",
    )  # fmt: skip
    assembly = assemble_volumes({Path("xa"): header})
    assert (assembly.images[0].shape, assembly.volumes, assembly.refusals) == ((5, 8, 9), (), ())


@pytest.mark.parametrize(
    "class_uid", [uids.OphthalmicTomographyImageStorage, uids.MultiFrameGrayscaleWordSecondaryCaptureImageStorage]
)
def test_frames_with_places_are_a_volume_whatever_their_class(tmp_path: Path, class_uid: str) -> None:
    frames = [{"ImagePositionPatient": ["0", "0", f"{index / 10}"]} for index in range(6)]
    write_multiframe(tmp_path / "a.dcm", np.zeros((6, 4, 4), np.int16), frames, SOPClassUID=class_uid)
    assembly = assemble(tmp_path)
    assert not assembly.images
    assert assembly.volumes[0].grid.spacing_mm == pytest.approx((0.1, 1, 1))


def test_projections_among_the_frames_are_left_aside(tmp_path: Path) -> None:
    frames = [{"ImagePositionPatient": ["0", "0", f"{index}"]} for index in range(5)]
    frames += [{"ImagePositionPatient": ["0", "0", "0"], "FrameType": ["DERIVED", "SECONDARY", "MIP", "NONE"]}]
    path = write_multiframe(tmp_path / "a.dcm", np.zeros((6, 4, 4), np.int16), frames)
    assembly = assemble(tmp_path)
    assert [ref.frame for ref in assembly.volumes[0].slices] == [1, 2, 3, 4, 5]
    assert [(refusal.sentence, refusal.sop_instance_uids) for refusal in assembly.refusals] == [
        ("it is a projection or a rendering, no slice (ImageType says MIP)", (read_header(path).SOPInstanceUID,))
    ]


@pytest.mark.parametrize(
    "kind", [["DERIVED", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "MPR"], ["DERIVED", "SECONDARY", "REFORMATTED"]]
)
def test_derived_slices_and_reformats_are_volumes(tmp_path: Path, kind: list[str]) -> None:
    write_series(tmp_path, np.zeros((5, 4, 4), np.int16), ImageType=kind)
    assert len(assemble(tmp_path).volumes) == 1


def test_slices_without_a_common_direction_are_refused_once(tmp_path: Path) -> None:
    """A radial scan: every slice is alone in its plane."""
    for number in range(4):
        angle = np.radians(45 * number)
        write_series(
            tmp_path / str(number), np.zeros((1, 4, 4), np.int16), row=(np.cos(angle), np.sin(angle), 0.0),
            column=(0.0, 0.0, -1.0), SeriesInstanceUID="1.2.3.4",
        )  # fmt: skip
    assembly = assemble(tmp_path)
    assert not assembly.volumes
    (refusal,) = assembly.refusals
    assert (refusal.sentence, len(refusal.sop_instance_uids)) == ("a single slice makes no volume", 4)
