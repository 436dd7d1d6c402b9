"""The frames of a segmentation, made as they are written: which there are, their pixels and their functional groups.

highdicom makes a segmentation frame by frame and holds all of it. A label map of a hundred organs has 15,000 frames;
here each frame's pixels are packed when the file is written, and its functional groups are a copy of the encoded ones
of another frame of the same slice, in which the segment's number is put right.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

_BLOCK = 8  # frames that are encoded at once: of bits, as many always fill whole bytes
# Tag, VR and length of the two elements of a frame that tell its segment (PS3.5 7.1.2).
_DIMENSION_INDEX_VALUES = bytes.fromhex("20005791") + b"UL" + struct.pack("<H", 8)  # of segment and place
_SEGMENT_NUMBER = bytes.fromhex("62000b00") + b"US" + struct.pack("<H", 2)


@dataclass(frozen=True)
class Place:
    """Where a frame's pixels come from."""

    slice: int  # index into the label map
    segment: int  # index into the segments in their order; 0 in a label map SEG, whose frames hold all


class Planes(Protocol):
    """The pixels of one form of segmentation."""

    bits: int  # per pixel
    pixels: int  # per frame
    present: NDArray[np.bool_]  # (slices, segments): the frames that are not empty; one segment where a frame holds all

    def encode(self, places: Sequence[Place]) -> bytes:
        """The pixel data of some frames after each other; of bits the last byte is filled with zeros."""
        ...


class Masks:
    """A bit for each segment's voxels (BINARY)."""

    bits = 1

    def __init__(self, labelmap: NDArray[np.uint16], labels: Sequence[int]):
        """`labelmap` is (slices, rows, columns); `labels` are the segments' values in it, in the segments' order."""
        slices, rows, columns = labelmap.shape
        self.pixels = rows * columns
        self._labelmap, self._labels = labelmap, labels
        number_of = np.zeros(max(labels) + 1, np.intp)
        number_of[list(labels)] = np.arange(1, len(labels) + 1)
        count = len(labels) + 1
        row_starts = np.arange(0, rows * count, count)[:, None]
        self.present = np.zeros((slices, len(labels)), bool)
        # A segment is looked for in the rows that it has in a slice, and in no others.
        self._first = np.zeros((slices, len(labels)), np.int32)
        self._end = np.zeros((slices, len(labels)), np.int32)
        for index, plane in enumerate(labelmap):
            if not plane.any():
                continue
            found = np.zeros(rows * count, bool)
            found[row_starts + number_of[plane]] = True
            by_row = found.reshape(rows, count)[:, 1:]
            self.present[index] = by_row.any(axis=0)
            self._first[index] = by_row.argmax(axis=0)
            self._end[index] = rows - by_row[::-1].argmax(axis=0)

    def encode(self, places: Sequence[Place]) -> bytes:
        """One bit per pixel, the first in the lowest bit (PS3.5 8.1.1)."""
        bits = np.zeros((len(places), *self._labelmap.shape[1:]), bool)
        for plane, place in zip(bits, places, strict=True):
            rows = slice(self._first[place.slice, place.segment], self._end[place.slice, place.segment])
            np.equal(self._labelmap[place.slice, rows], self._labels[place.segment], out=plane[rows])
        return np.packbits(bits, bitorder="little").tobytes()


class Numbers:
    """The segment's number in each voxel (LABELMAP)."""

    def __init__(self, labelmap: NDArray[np.uint16], labels: Sequence[int]):
        """As of `Masks`."""
        self.bits = 8 if len(labels) < 256 else 16  # as highdicom chooses them
        self.pixels = labelmap.shape[1] * labelmap.shape[2]
        self.present = np.asarray(labelmap.any(axis=(1, 2)))[:, None]
        self._labelmap = labelmap
        self._number_of = np.zeros(max(labels) + 1, f"<u{self.bits // 8}")
        self._number_of[list(labels)] = np.arange(1, len(labels) + 1)
        self._are_numbers = list(labels) == list(range(1, len(labels) + 1))

    def encode(self, places: Sequence[Place]) -> bytes:
        """8 or 16 bits per pixel."""
        planes = (self._labelmap[place.slice] for place in places)
        if self._are_numbers:  # ten times as fast as to look each up
            return b"".join(plane.astype(self._number_of.dtype).tobytes() for plane in planes)
        return b"".join(self._number_of[plane].tobytes() for plane in planes)


class Probabilities:
    """Each segment's probability in each voxel, 255 for certain (FRACTIONAL)."""

    bits = 8

    def __init__(self, probabilities: Mapping[int, NDArray[np.uint8]], labels: Sequence[int]):
        """A map of (slices, rows, columns) by label; a segment without one has no frames."""
        _, rows, columns = next(iter(probabilities.values())).shape
        self.pixels = rows * columns
        self._maps = [probabilities.get(label) for label in labels]
        slices = len(next(iter(probabilities.values())))
        nowhere = np.zeros(slices, bool)
        self.present = np.stack([nowhere if map_ is None else map_.any(axis=(1, 2)) for map_ in self._maps], axis=1)

    def encode(self, places: Sequence[Place]) -> bytes:
        """8 bits per pixel."""
        chosen = ((self._maps[place.segment], place.slice) for place in places)
        return b"".join(map_[index].tobytes() for map_, index in chosen if map_ is not None)


def order_frames(present: NDArray[np.bool_], slices: Sequence[int]) -> list[Place]:
    """The places of all frames: segment by segment, and of each the slices in the order of `slices`."""
    return [
        Place(index, int(segment))
        for segment in np.flatnonzero(present.any(axis=0))
        for index in slices
        if present[index, segment]
    ]


def stream_pixels(planes: Planes, places: Sequence[Place]) -> io.BufferedReader:
    """The value of Pixel Data as a stream that encodes the frames while it is read; it can be read again."""
    return io.BufferedReader(_Pixels(planes, places), 1 << 20)


def count_bytes(planes: Planes, frames: int) -> int:
    """The length of the value of Pixel Data, which is even."""
    return -(-frames * planes.pixels * planes.bits // 16) * 2


class _Pixels(io.RawIOBase):
    def __init__(self, planes: Planes, places: Sequence[Place]):
        super().__init__()
        self._planes, self._places = planes, places
        self._data_length = -(-len(places) * planes.pixels * planes.bits // 8)
        self._length = count_bytes(planes, len(places))
        self._block_length = planes.pixels * planes.bits * _BLOCK // 8
        self._position = 0
        self._block = b""
        self._number = -1  # of the block at hand

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        number, offset = divmod(self._position, self._block_length)
        length = min(len(view), self._data_length - self._position, self._block_length - offset)
        if length > 0:
            if number != self._number:
                self._block = self._planes.encode(self._places[number * _BLOCK : (number + 1) * _BLOCK])
                self._number = number
            view[:length] = self._block[offset : offset + length]
        elif length == 0 and len(view) and self._position < self._length:  # the byte that makes the length even
            length = 1
            view[:1] = b"\0"
        length = max(0, length)
        self._position += length
        return length


def join_items(templates: Mapping[int, bytes], places: Sequence[Place]) -> bytes:
    """The items of all frames, each that of its slice in `templates` with its own segment number.

    Where the frames of a form are not told apart by their segment, or all are of one, the items are taken as they are.
    """
    offsets = {index: _offsets(template) for index, template in templates.items()}
    items = []
    for place in places:
        item = templates[place.slice]
        value, number = offsets[place.slice]
        if number is not None and value is not None:
            item = bytearray(item)
            struct.pack_into("<I", item, value, place.segment + 1)  # C.7.6.17: indices start at 1
            struct.pack_into("<H", item, number, place.segment + 1)
        items.append(item)
    return b"".join(items)


def _offsets(item: bytes) -> tuple[int | None, int | None]:
    """Where an item has the dimension index of its segment, and its segment's number."""
    return _find(item, _DIMENSION_INDEX_VALUES), _find(item, _SEGMENT_NUMBER)


def _find(item: bytes, header: bytes) -> int | None:
    """Where the value of an element starts: no text in these items has a tag's bytes in it."""
    count = item.count(header)
    if count > 1:
        raise ValueError(f"{count} elements {header[:4].hex()} in the functional groups of a frame")
    return item.index(header) + len(header) if count else None
