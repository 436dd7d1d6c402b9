"""Objects of ours in a lossless compressed transfer syntax: which syntaxes suit an object, and the file in one of them.

Frames are read, compressed and let go one by one; a whole is held only as it is compressed. What pydicom has no encoder
for is not offered, such as High-Throughput JPEG 2000. Neither is Deflated Image Frame Compression
(1.2.840.10008.1.2.8.1, frames of single bits): pydicom 3.0 and highdicom 0.28 cannot read it, nor can DCMTK 3.6.7.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import dcmread
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filereader import read_file_meta_info
from pydicom.filewriter import write_file_meta_info
from pydicom.pixels import get_encoder, iter_pixels
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

# What `candidates` looks at.
_LAYOUT = (
    "Modality",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
)
_PHOTOMETRIC = {1: ("MONOCHROME1", "MONOCHROME2"), 3: ("RGB",)}
# By what they make of label maps: 50, 26 and 12 times smaller, in 0.5, 0.4 and 8 ms for a frame of 512x512.
_GREY = (JPEGLSLossless, RLELossless, JPEG2000Lossless)
# Of a segmentation RLE comes first: dcmqi 1.5.7 takes JPEG-LS Lossless for lossy there and refuses to read it.
_SEGMENTATION = (RLELossless, JPEGLSLossless, JPEG2000Lossless)
# RLE does nothing for pictures.
_COLOUR = (JPEGLSLossless, JPEG2000Lossless, RLELossless)
# Named, for pydicom takes the first in the alphabet, and GDCM 3.2 aborts the whole process over RLE of some odd sizes,
# such as 33x35 in colour.
_PLUGINS = {RLELossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", JPEG2000Lossless: "pylibjpeg"}
_SMALLEST_JPEG_2000 = 32  # pixels each way: OpenJPEG halves a frame five times
_CHUNK = 1 << 20


def candidates(file: Path) -> tuple[UID, ...]:
    """The transfer syntaxes that make the object in a file smaller, without loss, the best first; none may suit.

    Only what is in plain explicit VR little endian is ever compressed. Grey and colour pixels of 8 and 16 bits have
    encoders; a BINARY segmentation's single bits, floating-point pixels and objects without pixels can be deflated as a
    whole (PS3.5 A.5), which is last for the others because fewer peers take it.
    """
    header = dcmread(file, stop_before_pixels=True, specific_tags=list(_LAYOUT))
    if header.file_meta.TransferSyntaxUID != ExplicitVRLittleEndian:
        return ()
    samples = header.get("SamplesPerPixel")
    if (
        header.get("BitsAllocated") not in (8, 16)
        or header.get("BitsStored") != header.BitsAllocated
        or header.get("PixelRepresentation") != 0
        or header.get("PhotometricInterpretation") not in _PHOTOMETRIC.get(samples or 0, ())
    ):
        return (DeflatedExplicitVRLittleEndian,)
    encoders = _COLOUR if samples == 3 else _SEGMENTATION if header.get("Modality") == "SEG" else _GREY
    if min(header.Rows, header.Columns) < _SMALLEST_JPEG_2000:
        encoders = tuple(syntax for syntax in encoders if syntax != JPEG2000Lossless)
    return (*encoders, DeflatedExplicitVRLittleEndian)


def compress(source: Path, target: Path, syntax: UID) -> None:
    """Write the object in `source` to `target` in a transfer syntax that is one of its `candidates`.

    The object stays what it is, with its UID: lossless compression makes no new one (PS3.3 C.7.6.1.1.5).
    """
    if syntax not in candidates(source):
        raise ValueError(f"{source.name} cannot be compressed as {syntax.name}")
    if syntax == DeflatedExplicitVRLittleEndian:
        _deflate(source, target)
    else:
        _compress_frames(source, target, syntax)


def _deflate(source: Path, target: Path) -> None:
    """The same encoded data set, deflated after the file meta information."""
    meta = read_file_meta_info(source)
    meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with source.open("rb") as plain, target.open("wb") as file:
        plain.seek(_data_set_start(plain))
        file.write(b"\0" * 128 + b"DICM")
        write_file_meta_info(file, meta)  # pyright: ignore[reportArgumentType]
        compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        length = 0
        while chunk := plain.read(_CHUNK):
            length += file.write(compressor.compress(chunk))
        length += file.write(compressor.flush())
        file.write(b"\0" * (length % 2))


def _data_set_start(file: BinaryIO) -> int:
    """Where the data set follows the preamble and the file meta information, whose length its first element tells
    (PS3.10 7.1).
    """
    file.seek(132)
    element = file.read(12)
    if element[:8] != b"\x02\0\0\0UL\x04\0":
        raise ValueError("the file meta information does not start with its length")
    return 132 + 12 + int.from_bytes(element[8:], "little")


def _compress_frames(source: Path, target: Path, syntax: UID) -> None:
    dataset = dcmread(source, stop_before_pixels=True)
    pixels = Tag("PixelData")
    # OB whatever the depth: PS3.5 A.4.
    dataset[pixels] = DataElement(pixels, "OB", encapsulate(list(_encoded(source, dataset, syntax))))
    dataset["PixelData"].is_undefined_length = True
    if dataset.SamplesPerPixel > 1:
        dataset.PlanarConfiguration = 0  # as the frames were encoded; readers go by it (PS3.5 8.2.3, 8.2.4)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(target, enforce_file_format=True)


def _encoded(source: Path, header: Dataset, syntax: UID) -> Iterator[bytes]:
    options: dict[str, Any] = {
        "rows": header.Rows,
        "columns": header.Columns,
        "samples_per_pixel": header.SamplesPerPixel,
        "photometric_interpretation": header.PhotometricInterpretation,
        "bits_allocated": header.BitsAllocated,
        "bits_stored": header.BitsStored,
        "pixel_representation": header.PixelRepresentation,
        "number_of_frames": 1,
    }
    if header.SamplesPerPixel > 1:
        options["planar_configuration"] = 0  # as pydicom's arrays are, whatever the file has
    encoder = get_encoder(syntax)
    for frame in iter_pixels(source, raw=True):
        yield encoder.encode(frame, encoding_plugin=_PLUGINS[syntax], **options)
