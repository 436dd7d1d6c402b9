"""What a presentation state draws and writes on its images: items of the Graphic Annotation Sequence (PS3.3 C.10.5).

They are encoded here: a hundred organs are ten thousands of lines, for which highdicom and pydicom take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from node.report.encoded import encode_items, encode_sequence, encode_text, encode_value
from node.report.outlines import Outline, Polygon, area

# A value of FL has at most 65534 bytes (PS3.5 7.1.2), and a point takes 8.
MOST_POINTS_OF_A_LINE = 8000

_ANNOTATION = 0x0070


def encode_annotations(
    outlines: Sequence[Outline],
    refer: Callable[[int], Iterable[Dataset]],
    size: tuple[int, int],
    layer: Callable[[int], str],
    character_set: str | list[str] | None,
) -> bytes:
    """An item for each label on each slice or frame, in the layer of the label.

    `refer` gives the references to the image of a slice's index, `size` is the images' columns and rows, `layer` names
    a label's layer. Lines are closed; one of more than `MOST_POINTS_OF_A_LINE` corners is drawn in several pieces.
    """
    together: dict[tuple[int, int], list[Outline]] = {}
    for outline in outlines:
        together.setdefault((outline.index, outline.label), []).append(outline)
    references = {index: encode_items(refer(index), character_set) for index, _ in together}
    items = []
    for (index, label), alike in sorted(together.items()):
        graphics = [encoded for outline in alike for encoded in _graphics(outline, size, character_set)]
        texts = [_text(outline, size, character_set) for outline in alike]
        items.append(
            encode_sequence(0x0008, 0x1140, references[index])
            + encode_text(_ANNOTATION, 0x0002, "CS", layer(label), character_set)
            + encode_sequence(_ANNOTATION, 0x0008, _join(texts))
            + encode_sequence(_ANNOTATION, 0x0009, _join(graphics))
        )
    return _join(items)


def _join(items: Iterable[bytes]) -> bytes:
    return b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in items)


def _graphics(outline: Outline, size: tuple[int, int], character_set: str | list[str] | None) -> Iterator[bytes]:
    """The Graphic Object items of a finding: its outlines and its point."""
    identifier, uid = outline.tracking
    tracking = encode_text(0x0062, 0x0020, "UT", identifier, character_set) + encode_text(0x0062, 0x0021, "UI", uid)
    shapes = [("POLYLINE", np.vstack([polygon, polygon[:1]])) for polygon in outline.polygons]
    if outline.point is not None:
        shapes.append(("POINT", np.array([outline.point])))
    for kind, points in shapes:
        coordinates = _from_corner(points, size)
        for start in range(0, max(1, len(coordinates) - 1), MOST_POINTS_OF_A_LINE - 1):
            piece = coordinates[start : start + MOST_POINTS_OF_A_LINE]  # begins where the one before ended
            yield (
                tracking
                + encode_text(_ANNOTATION, 0x0005, "CS", "PIXEL")
                + encode_value(_ANNOTATION, 0x0020, "US", (2).to_bytes(2, "little"))
                + encode_value(_ANNOTATION, 0x0021, "US", len(piece).to_bytes(2, "little"))
                + encode_value(_ANNOTATION, 0x0022, "FL", piece.astype("<f4").tobytes())
                + encode_text(_ANNOTATION, 0x0023, "CS", kind)
                + encode_text(_ANNOTATION, 0x0024, "CS", "N")
            )


def _text(outline: Outline, size: tuple[int, int], character_set: str | list[str] | None) -> bytes:
    """The Text Object item: name and value to the right of the finding's uppermost corner; the viewer finds the room
    for it.
    """
    place = outline.point
    if place is None:
        largest = max(outline.polygons, key=area)
        place = min(largest.tolist(), key=lambda corner: (corner[1], -corner[0]))
    anchor = _from_corner(np.array([place]), size)
    return (
        encode_text(_ANNOTATION, 0x0004, "CS", "PIXEL")
        + encode_text(_ANNOTATION, 0x0006, "ST", outline.text[:1024], character_set)
        + encode_value(_ANNOTATION, 0x0014, "FL", anchor.astype("<f4").tobytes())
        + encode_text(_ANNOTATION, 0x0015, "CS", "N")
    )


def _from_corner(points: Polygon, size: tuple[int, int]) -> NDArray[np.float64]:
    """Coordinates from the first pixel's corner (PS3.3 C.10.5.1.2), within the image."""
    return np.clip(points + 0.5, 0, size)
