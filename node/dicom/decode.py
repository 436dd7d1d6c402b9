"""The stored values of an instance, frame by frame: by offset where they lie plainly in the file, else by pydicom.

Most series are uncompressed: their frames are read straight into an array, and no other byte of the pixel data is
touched. Everything that is not quite plain (compressed, deflated, big endian, colour, floats, odd bits) goes through
pydicom's decoders. Nothing here knows what the values mean; that is `node.dicom.realworld`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from node.dicom.identity import is_uid
from node.errors import InputRefused

PIXELS = (
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "ModalityLUTSequence", "RealWorldValueMappingSequence",
)  # fmt: skip

# pydicom tries its plug-ins in alphabetical order. Measured on 512x512 of 16 bits: RLE 10 ms by pydicom itself and 1 ms
# by pylibjpeg, JPEG-LS 9 ms by gdcm and 5 ms by pyjpegls; JPEG 2000 is quickest by gdcm, which comes first.
_QUICKEST = {RLELossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", JPEGLSNearLossless: "pyjpegls"}

# Syntaxes that keep every bit where it was; the others encode values, wherever their bits were.
_AS_STORED = (
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
)  # fmt: skip

_PIXEL_DATA = b"\xe0\x7f\x10\x00"
_LONG_LENGTH = (b"OB\0\0", b"OW\0\0")  # with the two reserved bytes after them (PS3.5 7.1.2)


class _Frames(Protocol):
    """One way of reading an instance's frames."""

    @property
    def header(self) -> Dataset: ...

    def stored(self, frame: int) -> NDArray[Any]: ...

    def rgb(self, frame: int) -> NDArray[np.uint8]: ...


class OpenInstance:
    """An instance whose file is open, frame by frame. Threads may share it.

    Its methods raise `InputRefused` for what cannot be decoded, naming the instance and its transfer syntax.
    """

    def __init__(self, frames: _Frames, sop_instance_uid: str, syntax: str):
        self._frames = frames
        self._names = sop_instance_uid, syntax
        self.header = frames.header  # the attributes of `PIXELS` at least, as the file has them

    def stored(self, frame: int) -> NDArray[Any]:
        """The stored values (rows, columns) of a frame (1-based), in an array of their own.

        Bits above BitsStored are as they were sent.
        """
        with _refusing(*self._names):
            return self._frames.stored(frame)

    def rgb(self, frame: int) -> NDArray[np.uint8]:
        """The colours (rows, columns, 3) of a frame (1-based) of a colour image; 16 bits become the upper 8."""
        with _refusing(*self._names):
            return self._frames.rgb(frame)


@contextmanager
def open_instance(path: Path, sop_instance_uid: str, known: Dataset | None = None) -> Iterator[OpenInstance]:
    """The instance in `path`; raises `InputRefused` where it has no pixel data or none that can be decoded here.

    `known` is its header where `node.dicom.header.read_header` has read it: one that says where its pixels are is not
    read again.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise _refusal(sop_instance_uid, "", error) from error
    with file:
        with _refusing(sop_instance_uid, ""):
            there, offset = getattr(known, "pixel_place", None) or (None, 0)
            if known is not None and there == path:
                header = known
                file.seek(offset)
            else:
                header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(PIXELS))
            syntax = str(header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian))
            is_shifted = _is_shifted(header, syntax)
        if is_shifted:
            raise InputRefused(
                f"the pixel data of instance {sop_instance_uid} cannot be read: HighBit {header.HighBit} is not "
                f"BitsStored {header.BitsStored} less one, so where its values lie is not known"
            )
        with _refusing(sop_instance_uid, syntax):
            frames = _plain_frames(header, file, syntax) or _DecodedFrames(path)
        yield OpenInstance(frames, sop_instance_uid, syntax)


def _is_shifted(header: Dataset, syntax: str) -> bool:
    """Whether values lie above the lowest bits, which only old objects may do (PS3.5 8.1.1); no decoder shifts them."""
    high, stored = header.get("HighBit"), header.get("BitsStored")
    return syntax in _AS_STORED and isinstance(high, int) and isinstance(stored, int) and high > stored - 1


@contextmanager
def _refusing(sop_instance_uid: str, syntax: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the decoders raise many kinds
        raise _refusal(sop_instance_uid, syntax, error) from error


def _refusal(sop_instance_uid: str, syntax: str, error: Exception) -> InputRefused:
    if isinstance(error, _Truncated):
        reason = "the file is truncated"
    elif isinstance(error, NotImplementedError):
        reason = "no decoder here reads this transfer syntax; send it in another one"
    else:
        reason = type(error).__name__
    # What is no UID may be any text of a damaged file.
    name = UID(syntax).name if is_uid(syntax) else "an unknown transfer syntax"
    return InputRefused(f"the pixel data of instance {sop_instance_uid} ({name}) cannot be decoded: {reason}")


class _Truncated(Exception):
    """The file ends before its pixel data does."""


@dataclass(frozen=True)
class _PlainFrames:
    """Uncompressed grey frames, little endian, at a known place of the file."""

    header: Dataset
    descriptor: int  # of the open file
    offset: int  # of the first frame
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    count: int

    def stored(self, frame: int) -> NDArray[Any]:
        """See `OpenInstance`."""
        if not 1 <= frame <= self.count:
            raise ValueError(f"there is no frame {frame}")
        values = np.empty(self.shape, self.dtype)
        view, offset = (
            values.data.cast("B"),
            self.offset + (frame - 1) * values.nbytes,
        )
        while len(view):
            got = os.preadv(self.descriptor, [view], offset)
            if got == 0:
                raise _Truncated
            view, offset = view[got:], offset + got
        return values

    def rgb(self, frame: int) -> NDArray[np.uint8]:
        """Never asked for: a colour image is not plain."""
        raise TypeError(f"frame {frame} has no colours")


def _plain_frames(header: Dataset, file: BinaryIO, syntax: str) -> _PlainFrames | None:
    """The frames when the file holds them plainly; `file` stands where the header ended."""
    if syntax not in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        return None
    rows, columns, allocated, stored, high, sign, samples = (
        header.get(keyword)
        for keyword in (
            "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
        )
    )  # fmt: skip
    whole = all(isinstance(value, int) for value in (rows, columns, allocated, stored, high, sign, samples))
    if not whole or allocated not in (8, 16, 32) or sign not in (0, 1) or samples != 1:
        return None
    if not 1 <= stored <= allocated or high != stored - 1:
        return None
    if header.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        return None
    count = int(header.get("NumberOfFrames") or 1)
    start = file.tell()
    element = file.read(12)
    implicit = syntax == ImplicitVRLittleEndian
    if element[:4] != _PIXEL_DATA or not (implicit or element[4:8] in _LONG_LENGTH):
        return None
    length = int.from_bytes(element[4:8] if implicit else element[8:12], "little")
    offset = start + (8 if implicit else 12)
    wanted = count * rows * columns * allocated // 8
    # Lengths are even (PS3.5 7.1); an odd one is a VR: the data set is explicit whatever the file calls it.
    if length == 0xFFFFFFFF or length % 2 or length < wanted:
        return None
    if os.fstat(file.fileno()).st_size < offset + wanted:
        raise _Truncated
    dtype = np.dtype(f"<{'i' if sign else 'u'}{allocated // 8}")
    return _PlainFrames(header, file.fileno(), offset, (rows, columns), dtype, count)


class _DecodedFrames:
    """Frames that pydicom decodes, one at a time from the encoded pixel data in memory."""

    def __init__(self, path: Path):
        dataset = dcmread(path, force=True)
        if (
            "TransferSyntaxUID" not in dataset.file_meta
        ):  # files without file meta information are implicit VR (PS3.5 10)
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        self.header: Dataset = dataset
        self._syntax = UID(dataset.file_meta.TransferSyntaxUID)
        if self._syntax == JPEGExtended12Bit and int(dataset.BitsStored) > 8:
            raise NotImplementedError  # gdcm would raise, for each frame
        self._decoder = get_decoder(self._syntax)
        self._plugin = _QUICKEST.get(self._syntax, "")
        self._places = _split_frames(dataset) if self._syntax.is_encapsulated else {}

    def stored(self, frame: int) -> NDArray[Any]:
        """See `OpenInstance`."""
        return self._decode(frame, raw=True)

    def rgb(self, frame: int) -> NDArray[np.uint8]:
        """See `OpenInstance`."""
        header = self.header
        if header.PhotometricInterpretation == "PALETTE COLOR":
            colours = apply_color_lut(self._decode(frame, raw=True), header)
            bits = 16 if colours.dtype == np.uint16 else 8
            if bits == 16 and colours.max() < 256:  # 8 bits written into 16, which PS3.3 C.7.9.1 allows in old images
                bits = 8
        else:
            # Without `raw` YBR_FULL and YBR_FULL_422 become RGB; JPEG 2000 is RGB as its decoders leave it.
            colours = self._decode(frame, raw=False)
            bits = int(header.BitsStored)
        if colours.ndim != 3 or colours.shape[2] != 3:
            raise ValueError(f"no colours in an array of shape {colours.shape}")
        if bits > 8:
            colours = colours >> (bits - 8)
        return np.ascontiguousarray(colours, np.uint8)

    def _decode(self, frame: int, *, raw: bool) -> NDArray[Any]:
        index = frame - 1
        if not 0 <= index < int(self.header.get("NumberOfFrames") or 1):
            raise ValueError(f"there is no frame {frame}")
        try:
            values, _ = self._decoder.as_array(
                self.header, index=index, raw=raw, decoding_plugin=self._plugin, **self._places
            )
        except Exception:
            if not self._plugin:
                raise
            # By any plug-in that can.
            values, _ = self._decoder.as_array(self.header, index=index, raw=raw, **self._places)
        return values if values.flags.writeable else values.copy()


def _split_frames(dataset: Dataset) -> dict[str, Any]:
    """Where each frame of encapsulated pixel data lies, as an option of pydicom's decoders.

    For every frame that is asked for, pydicom goes through all offsets, or through all fragments where there are none
    (PS3.5 A.4): of 10,000 frames that is most of the time. So it is done once here, and each frame made one fragment.
    """
    count = int(dataset.get("NumberOfFrames") or 1)
    if count < 2:
        return {}
    table, lengths = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    try:
        frames = list(
            generate_frames(
                dataset.PixelData, number_of_frames=count, extended_offsets=(table, lengths) if table else None
            )
        )
    except Exception:  # of damaged pixel data; those frames that can be found still can be one by one
        return {}
    if len(frames) < count:
        return {}
    sizes = [len(frame) for frame in frames]
    dataset["PixelData"].value = b"".join([_item(b""), *map(_item, frames)])
    return {"extended_offsets": ([0, *accumulate(size + 8 for size in sizes[:-1])], sizes)}


def _item(content: bytes) -> bytes:
    return b"\xfe\xff\x00\xe0" + len(content).to_bytes(4, "little") + content
