"""What a worker and the process of its model say to each other: short JSON messages, and behind them arrays.

Every message is four bytes of length and a JSON object. A request's voxels and a result's label map follow it as plain
bytes: a copy through the socket takes 0.08 s for 400 slices as float32, where a memory file's fresh pages took up to
1.2. The worker believes nothing: it alone decides how large anything is, what comes back is parsed field by field, and
nothing that a model's process sends is ever unpickled.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node.dicom.volume import Grid, Image, SliceRef, Volume
from node.errors import ModelError, OutputRefused
from node.infer.manifest import Manifest, Task
from node.infer.results import (
    Box,
    Boxes,
    Certainties,
    Labelmap,
    Landmark,
    Landmarks,
    Prediction,
    Scores,
    check_labels,
    filled_slices,
    sparse_zeros,
)
from node.text import one_line

MESSAGE_MAX = 16 << 20  # bytes: 100,000 boxes are fewer
_PIECE = 4 << 20  # bytes of one read
FINDINGS_MAX = 100_000
REMARKS_MAX = 20
TEXT_MAX = 1000
_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "float32", "float64")
_LABEL_DTYPES = ("uint8", "uint16")
# What is said of a series' acquisition and display, and nothing of the patient, the place or the time.
_ATTRIBUTES = (
    "BodyPartExamined", "ContrastBolusAgent", "ConvolutionKernel", "EchoTime", "ImageLaterality", "KVP", "Laterality",
    "MagneticFieldStrength", "Manufacturer", "ManufacturerModelName", "PhotometricInterpretation", "RepetitionTime",
    "RescaleType", "SequenceName", "SliceThickness", "ViewPosition", "WindowCenter", "WindowWidth",
)  # fmt: skip


class Channel:
    """One end of a connected AF_UNIX stream."""

    def __init__(self, end: socket.socket):
        self._end = end
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For poll."""
        return self._end.fileno()

    def send(self, message: Mapping[str, Any], arrays: Sequence[NDArray[Any]] = ()) -> None:
        """Send one message, and the arrays' bytes behind it."""
        data = json.dumps(message, default=_plain).encode()
        self._end.sendall(struct.pack("!I", len(data)) + data)
        for array in arrays:
            self._end.sendall(bytes_of(np.ascontiguousarray(array)))

    def receive(self) -> dict[str, Any]:
        """The next message, for the model's process. `EOFError` when the other end is closed."""
        message = self.read_arrived()
        while message is None:
            message = self.read_some()
        return message

    def receive_array(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The next array behind a message, for the model's process. After `MemoryError` the next one comes."""
        try:
            array = np.empty(shape, dtype)
        except MemoryError:
            self._skip(math.prod(shape) * np.dtype(dtype).itemsize)
            raise
        view = bytes_of(array)
        while len(view):
            view = view[self.read_into(view) :]
        return array

    def _skip(self, count: int) -> None:
        waste = memoryview(bytearray(1 << 16))
        while count:
            count -= self.read_into(waste[:count])

    def read_some(self) -> dict[str, Any] | None:
        """What has arrived: a whole message, or None when more must come. Raises `EOFError` at the end, `ModelError`
        for what is no message.
        """
        data = self._end.recv(1 << 16)
        if not data:
            raise EOFError
        self._buffer += data
        return self._take()

    def read_arrived(self) -> dict[str, Any] | None:
        """A whole message that came together with the one before it: no poll tells of it any more."""
        return self._take()

    def read_into(self, view: memoryview) -> int:
        """Some bytes of what follows a message; how many. Raises `EOFError` at the end."""
        if count := self.take_arrived(view):
            return count
        if not (count := self._end.recv_into(view, min(len(view), _PIECE))):
            raise EOFError
        return count

    def take_arrived(self, view: memoryview) -> int:
        """The bytes behind a message that came together with it: no poll tells of them any more. How many."""
        count = min(len(view), len(self._buffer))
        view[:count] = self._buffer[:count]
        del self._buffer[:count]
        return count

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _take(self) -> dict[str, Any] | None:
        if len(self._buffer) < 4:
            return None
        length = struct.unpack("!I", self._buffer[:4])[0]
        if length > MESSAGE_MAX:
            raise ModelError(f"the model's process announced a message of {length} bytes: it is not believed")
        if len(self._buffer) < 4 + length:
            return None
        data = bytes(self._buffer[4 : 4 + length])
        del self._buffer[: 4 + length]
        try:
            message = json.loads(data, parse_constant=str)  # NaN is no number but a text, which every check refuses
        except (ValueError, RecursionError):
            raise ModelError("the model's process sent what is no message: it is not believed") from None
        if not isinstance(message, dict):
            raise ModelError("the model's process sent what is no message: it is not believed")
        return message


def _plain(value: object) -> object:
    """numpy's numbers, which models return, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in a result")


def bytes_of(array: NDArray[Any]) -> memoryview:
    """The bytes of an array in C order, where they lie."""
    return array.reshape(-1).view(np.uint8).data


# -- Inputs ------------------------------------------------------------------------------------------------------------


def describe_input(source: Volume | Image) -> dict[str, Any]:
    """What a model is told of an input beside its voxels: geometry, modality and unit; no UID and nothing of the
    patient.
    """
    if source.array.dtype.name not in _DTYPES:
        raise ModelError(f"no model takes voxels of type {source.array.dtype}")
    common: dict[str, Any] = {
        "dtype": source.array.dtype.name,
        "shape": list(source.array.shape),
        "modality": source.modality,
        "attributes": {keyword: text for keyword, text in source.attributes.items() if keyword in _ATTRIBUTES},
    }
    if isinstance(source, Image):
        return common | {"spacing_mm": source.spacing_mm}
    positions = source.positions_lps
    return common | {
        "affine_lps": source.grid.affine_lps.tolist(),
        "unit": source.unit,
        "positions_lps": None if positions is None else positions.tolist(),
    }


def restore_input(described: Mapping[str, Any], array: NDArray[Any]) -> Volume | Image:
    """The input as the model sees it: what `describe_input` told, with its voxels."""
    shape: tuple[int, ...] = tuple(described["shape"])
    sources = tuple(SliceRef("", "") for _ in range(shape[0]))
    if "affine_lps" not in described:
        spacing = described["spacing_mm"]
        return Image(
            array=array,
            frames=sources,
            series_uid="",
            study_uid="",
            modality=described["modality"],
            spacing_mm=tuple(spacing) if spacing else None,
            attributes=described["attributes"],
        )
    positions = described["positions_lps"]
    return Volume(
        array=array,
        grid=Grid((shape[0], shape[1], shape[2]), np.array(described["affine_lps"], np.float64), ""),
        slices=sources,
        series_uid="",
        study_uid="",
        modality=described["modality"],
        unit=described["unit"],
        attributes=described["attributes"],
        positions_lps=None if positions is None else np.array(positions, np.float64),
    )


# -- Predictions -------------------------------------------------------------------------------------------------------


def describe_prediction(
    prediction: Prediction, manifest: Manifest, inputs: Mapping[str, Volume | Image]
) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """A prediction as a message, and the arrays that follow it: a label map, and where the manifest wants them the
    filled slices of each label's probabilities. `OutputRefused` for what no worker takes.
    """
    common: dict[str, Any] = {"input": prediction.input, "remarks": [str(remark) for remark in prediction.remarks]}
    match prediction:
        case Labelmap(array=array):
            if array.dtype.name not in _LABEL_DTYPES:
                raise OutputRefused(f"the model returned a label map of type {array.dtype}; expected uint8 or uint16")
            if prediction.input not in inputs:
                raise OutputRefused(_not_given(prediction.input))
            if array.shape != (wanted := inputs[prediction.input].array.shape[:3]):
                raise OutputRefused(f"the model returned a map of shape {array.shape}, the input's grid is {wanted}")
            if array.max(initial=0) <= np.iinfo(np.uint8).max:
                array = array.astype(np.uint8, copy=False)
            common |= {"kind": "labelmap", "dtype": array.dtype.name}
            arrays: list[NDArray[Any]] = [array]
            if manifest.probabilities and prediction.probabilities is not None:
                maps = {
                    label: (filled_slices(values), values)
                    for label in manifest.segments
                    if (values := prediction.probabilities.get(label)) is not None
                    and values.shape == array.shape
                    and values.dtype == np.uint8
                }
                common |= {"probabilities": {str(label): ends for label, (ends, _) in maps.items()}}
                arrays += [values[first:stop] for (first, stop), values in maps.values()]
            return common | {"bytes": sum(one.nbytes for one in arrays)}, arrays
        case Boxes(boxes=boxes):
            return common | {"kind": "boxes", "boxes": [asdict(box) for box in boxes]}, []
        case Landmarks(points=points):
            return common | {"kind": "landmarks", "points": [asdict(point) for point in points]}, []
        case Scores(values=values, exclusive=exclusive):
            rows = [{str(label): value for label, value in row.items()} for row in values]
            return common | {"kind": "scores", "values": rows, "exclusive": exclusive}, []
        case _:
            raise OutputRefused("the model returned DICOM objects, which only a program with folders of its own may")


_KINDS = {
    Task.SEGMENTATION: "labelmap",
    Task.DETECTION: "boxes",
    Task.CLASSIFICATION: "scores",
    Task.LANDMARKS: "landmarks",
}


def restore_prediction(
    message: Mapping[str, Any],
    manifest: Manifest,
    inputs: Mapping[str, Volume | Image],
    receive: Callable[[NDArray[Any]], None],
) -> Prediction:
    """The prediction that a message describes; `receive` fills an array with the next bytes behind it.

    Raises `OutputRefused` for whatever is no result for these inputs and this manifest.
    """
    kind = _KINDS[manifest.task]
    if message.get("kind") != kind:
        raise OutputRefused(f"the model returned {_shown(message.get('kind'))}; a {manifest.task} gives {kind}")
    name = message.get("input")
    if not isinstance(name, str) or name not in inputs:
        raise OutputRefused(_not_given(name))
    remarks = tuple(clean_text(text) for text in _list(message, "remarks", REMARKS_MAX) if isinstance(text, str))
    source = inputs[name]
    match kind:
        case "labelmap":
            array = _receive_labelmap(message, source, receive)
            found = _receive_probabilities(message, manifest, array.shape, receive) if manifest.probabilities else None
            check_labels(array, manifest.segments)
            grid = source.grid if isinstance(source, Volume) else None
            return Labelmap(array.astype(np.uint16, copy=False), grid, name, remarks, found)
        case "boxes":
            boxes = tuple(_box(item, manifest) for item in _list(message, "boxes", FINDINGS_MAX))
            return Boxes(boxes, name, remarks)
        case "landmarks":
            points = tuple(_landmark(item, manifest, source) for item in _list(message, "points", FINDINGS_MAX))
            return Landmarks(points, name, remarks)
        case _:
            rows = tuple(_score_row(item, manifest) for item in _list(message, "values", FINDINGS_MAX))
            if len(rows) not in (1, source.array.shape[0]):
                raise OutputRefused(f"the model returned scores for {len(rows)} frames of {source.array.shape[0]}")
            return Scores(rows, message.get("exclusive") is not False, name, remarks)


def _not_given(name: object) -> str:
    return f"the model returned a result for the input {_shown(name)}, which it was not given"


def restore_seconds(message: Mapping[str, Any]) -> dict[str, float]:
    """How long the parts of a run took, as the model's process says: shown, and relied on by nothing."""
    found = message.get("seconds")
    if not isinstance(found, dict) or len(found) > 32:
        return {}
    return {
        clean_text(name)[:40]: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and 0 <= value < 1e9
    }


def clean_text(text: str) -> str:
    """Text of a model as it may stand in an error or a log: one line, printable, bounded."""
    return one_line(text, TEXT_MAX)


def _receive_labelmap(
    message: Mapping[str, Any], source: Volume | Image, receive: Callable[[NDArray[Any]], None]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    dtype = message.get("dtype")
    if dtype not in _LABEL_DTYPES:
        raise OutputRefused(f"the model returned a label map of type {_shown(dtype)}; expected uint8 or uint16")
    array = np.empty(source.array.shape[:3], str(dtype))
    receive(array)
    return array


def _receive_probabilities(
    message: Mapping[str, Any], manifest: Manifest, shape: tuple[int, ...], receive: Callable[[NDArray[Any]], None]
) -> Certainties | None:
    """What each label's map is said to be filled with; any byte is a probability."""
    said = message.get("probabilities")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise OutputRefused("the model's result does not say where its probabilities are")
    found: Certainties = {}
    for label in manifest.segments:
        if (ends := said.get(str(label))) is None:
            continue
        if not isinstance(ends, list) or len(ends) != 2 or not all(type(end) is int for end in ends):
            raise OutputRefused(f"the model returned {_shown(ends)} as the slices that label {label} fills")
        first, stop = ends
        if not 0 <= first <= stop <= shape[0]:
            raise OutputRefused(f"the model's probabilities of label {label} are on slices {first} to {stop}")
        found[label] = sparse_zeros(shape)
        receive(found[label][first:stop])
    return found


def _box(item: object, manifest: Manifest) -> Box:
    fields = _fields(item)
    low, high = _point(fields.get("low_lps")), _point(fields.get("high_lps"))
    if any(below > above for below, above in zip(low, high, strict=True)):
        raise OutputRefused("the model returned a box whose low corner lies above its high one")
    return Box(_label(fields.get("label"), manifest), _probability(fields.get("score")), low, high)


def _landmark(item: object, manifest: Manifest, source: Volume | Image) -> Landmark:
    fields = _fields(item)
    frames, rows, columns = source.array.shape[:3]
    frame, row, column = fields.get("frame"), _number(fields.get("row")), _number(fields.get("column"))
    if not isinstance(frame, int) or isinstance(frame, bool) or not 0 <= frame < frames:
        raise OutputRefused(f"the model returned a point on frame {_shown(frame)} of {frames}")
    if not (-0.5 <= row <= rows - 0.5 and -0.5 <= column <= columns - 0.5):
        raise OutputRefused(f"the model returned a point at row {row:g}, column {column:g} of {rows} x {columns}")
    score = fields.get("score")
    label = _label(fields.get("label"), manifest)
    return Landmark(label, frame, row, column, None if score is None else _probability(score))


def _score_row(item: object, manifest: Manifest) -> dict[int, float]:
    fields = _fields(item)
    row: dict[int, float] = {}
    for text, value in fields.items():
        if not (text.isascii() and text.isdigit() and len(text) <= 5):
            raise OutputRefused(f"the model returned a score for the class {_shown(text)}")
        row[_label(int(text), manifest)] = _probability(value)
    return row


def _list(message: Mapping[str, Any], name: str, most: int) -> list[object]:
    found = message.get(name)
    if not isinstance(found, list):
        raise OutputRefused(f"the model's result has no list of {name}")
    if len(found) > most:
        raise OutputRefused(f"the model returned {len(found)} {name}; {most} are the most")
    return found


def _fields(item: object) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise OutputRefused(f"the model's result holds {_shown(item)} where a finding must stand")
    return item


def _label(value: object, manifest: Manifest) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in manifest.classes:
        raise OutputRefused(f"the model returned the class {_shown(value)} that dicom.yaml does not declare")
    return value


def _number(value: object) -> float:
    # Python compares whole numbers of any length with floats exactly; beyond 1e300 none is a coordinate.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        raise OutputRefused(f"the model returned {_shown(value)} where a finite number must stand")
    return float(value)


def _probability(value: object) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise OutputRefused(f"the model returned {number:g} where a probability (0 to 1) must stand")
    return number


def _point(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise OutputRefused(f"the model returned {_shown(value)} where a point (x, y, z) must stand")
    x, y, z = (_number(part) for part in value)
    return x, y, z


def _shown(value: object) -> str:
    """A value in a sentence; the content of what is nested is nobody's concern."""
    return type(value).__name__ if isinstance(value, list | dict) else clean_text(repr(value)[:100])
