"""What a page says of the images and of the run: which series, how it was acquired, when it was analysed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from node.dicom.candidates import numbers
from node.dicom.frames import flatten_first_frame
from node.dicom.volume import Image, Volume
from node.report.seg import stamp
from node.report.subject import Origin, Subject
from node.report.words import Words

_TAKEN = (
    ("AcquisitionDate", "AcquisitionTime"),
    ("AcquisitionDateTime", ""),
    ("ContentDate", "ContentTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
_IDENTITY = ("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthDate", "PatientBirthName", "AccessionNumber")
_NAME_LEAST = 3  # letters of what is taken for a part of a name: initials stand in too many words


def describe_source(origin: Origin, source: Volume | Image, words: Words) -> list[tuple[str, str]]:
    """Name and value of each fact about the images that a result is of and about its making."""
    header = flatten_first_frame(origin.sources[0]) if "NumberOfFrames" in origin.sources[0] else origin.sources[0]
    parts = [source.modality]
    if isinstance(source, Volume):
        parts.append(f"{source.array.shape[0]} {words.slices}")
        if thickness := numbers(header, "SliceThickness", 1):
            parts.append(f"{words.thickness} {round(thickness[0], 2):g} mm")
        if source.array.shape[0] > 1:
            parts.append(f"{words.spacing} {round(source.grid.spacing_mm[0], 2):g} mm")
        if kernel := _text(header, "ConvolutionKernel"):
            parts.append(f"{words.kernel} {kernel}")
        if source.name:
            parts.append(source.name)
    else:
        frames, rows, columns = source.array.shape[:3]
        parts += [f"{frames} {words.frames}"] if frames > 1 else []
        parts.append(f"{columns} x {rows}")
    return [
        (words.series, describe_series(header)),
        (words.images, ", ".join(parts)),
        (words.acquisition, _when(header)),
        (words.analysis, when_made(origin)),
    ]


def describe_study(origin: Origin, words: Words) -> list[tuple[str, str]]:
    """Name and value of each fact about a study of which there is no result."""
    header = origin.sources[0]
    facts = [
        (words.study, _without_patient(header, _text(header, "StudyDescription"))),
        (words.acquisition, _when(header)),
    ]
    return [*(fact for fact in facts if fact[1]), (words.analysis, when_made(origin))]


def list_series(origin: Origin, words: Words) -> list[str]:
    """A line for each series among the images that were looked at, the largest first."""
    series: dict[str, list[Dataset]] = {}
    for header in origin.sources:
        series.setdefault(str(header.get("SeriesInstanceUID")), []).append(header)
    lines = []
    for headers in sorted(series.values(), key=lambda headers: -len(headers)):
        count = sum(int((numbers(header, "NumberOfFrames", 1) or [1])[0]) for header in headers)
        counted = f"1 {words.image}" if count == 1 else words.counted.format(count=count)
        lines.append(f"{describe_series(headers[0])},  {_text(headers[0], 'Modality')},  {counted}")
    return lines


def describe_series(header: Dataset) -> str:
    """Number and description of a series, as viewers list it; of one without either the end of its UID."""
    known = [_text(header, "SeriesNumber"), _without_patient(header, _text(header, "SeriesDescription"))]
    return ": ".join(part for part in known if part) or f"...{str(header.get('SeriesInstanceUID'))[-14:]}"


def when_made(origin: Origin) -> str:
    """Date and time of the analysis as the result objects have them."""
    dated = Dataset()
    stamp(dated, origin)  # pyright: ignore[reportArgumentType]
    return _show_date(dated.ContentDate, dated.ContentTime)


def image_numbers(origin: Origin) -> dict[str, int]:
    """SOP Instance UID to the number that viewers show an image under."""
    found = {}
    for header in origin.sources:
        if (number := numbers(header, "InstanceNumber", 1)) and "NumberOfFrames" not in header:
            found[str(header.SOPInstanceUID)] = int(number[0])
    return found


def name_slice(subject: Subject, index: int, words: Words, numbers: Mapping[str, int]) -> str:
    """A slice or frame by its place in the array, as the report counts them, and of a slice also the number that
    viewers show the image under (of `image_numbers`)."""
    if not isinstance(subject.source, Volume):
        return f"{words.frame} {index + 1}"
    number = numbers.get(subject.source_slices[index].sop_instance_uid)
    return f"{words.slice} {index + 1}" + ("" if number is None else f" ({words.image} {number})")


def _when(header: Dataset) -> str:
    """When the images were acquired, else the next best that the header says; empty where it says nothing."""
    for date, time in _TAKEN:
        found = re.sub(r"\D", "", _text(header, date).split("+")[0].split("-")[0].split(".")[0])
        if len(found) >= 8:
            return _show_date(found[:8], found[8:] or re.sub(r"\D", "", _text(header, time).split(".")[0]))
    return ""


def _show_date(date: str, time: str) -> str:
    shown = f"{date[:4]}-{date[4:6]}-{date[6:8]}"
    return f"{shown} {time[:2]}:{time[2:4]}" if len(time) >= 4 else shown


def _without_patient(header: Dataset, text: str) -> str:
    """A description without the patient's name, ID and birth date, which people put into descriptions at times."""
    for keyword in _IDENTITY:
        value = _text(header, keyword)
        for part in {value, *re.split(r"[\^=\s]+", value)}:
            if len(part) >= _NAME_LEAST:
                text = re.sub(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", "...", text, flags=re.IGNORECASE)
    return text


def _text(header: Dataset, keyword: str) -> str:
    """The element's text on one line; empty where there is none or it cannot be read."""
    try:
        value = header.get(keyword)
    except Exception:  # pydicom raises many kinds for a value that it cannot convert
        return ""
    parts = list(value) if isinstance(value, MultiValue) else [value]
    return " ".join(" ".join(str(part).split()) for part in parts if part is not None)
