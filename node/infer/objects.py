"""DICOM objects that a model's own program wrote: taken as its results when they are of the study that it was given.

Every object gets a SOP Instance and a Series UID that follow from the job, so that the same work done twice is the same
object, and no program can overwrite what is in the archive. References among the objects follow. What the program left
empty of patient and study is filled in from the input; what it wrote otherwise is refused, not corrected.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom import config as pydicom_config
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, UID_dictionary

from node.dicom.identity import PATIENT_AND_STUDY_KEYWORDS, is_uid
from node.dicom.uid import derive_uid
from node.errors import OutputRefused

_SAME_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "IssuerOfPatientID")
_FILLED = (*PATIENT_AND_STUDY_KEYWORDS, "IssuerOfPatientID")
_STORAGE = "Storage"


@dataclass(frozen=True)
class WrittenFile:
    """A file in the out-folder that looks like DICOM."""

    name: str  # relative to the out-folder
    content: bytes


def take_objects(files: Sequence[WrittenFile], inputs: Sequence[Dataset], key: str) -> tuple[Dataset, ...]:
    """The objects of `files` under the job's UIDs, in an order that repeats.

    `inputs` are the headers of the instances that the program was given. Raises `OutputRefused` for a file that is no
    DICOM object, lacks what an object needs, or is of another study or patient than the inputs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes values that it finds odd, and they may be a patient's
        return _take_objects(files, inputs, key)


def _take_objects(files: Sequence[WrittenFile], inputs: Sequence[Dataset], key: str) -> tuple[Dataset, ...]:
    objects: list[Dataset] = []
    for file in files:
        dataset = _read(file)
        _check_subject(dataset, inputs[0], file.name)
        objects.append(dataset)
    own = [str(dataset.SOPInstanceUID) for dataset in objects]
    if len(set(own)) != len(own):
        raise OutputRefused("two of the objects that the model wrote have the same SOP Instance UID")
    ordered = sorted(objects, key=_order)
    renamed = _derive_uids(ordered, key)
    # A program that kept an input's UID for its own object means the input where it refers to it.
    given = {str(header.get(keyword)) for header in inputs for keyword in ("SOPInstanceUID", "SeriesInstanceUID")}
    references = {old: new for old, new in renamed.items() if old not in given}
    for dataset in ordered:
        _fill(dataset, inputs[0])
        instance_uid, series_uid = renamed[str(dataset.SOPInstanceUID)], renamed[str(dataset.SeriesInstanceUID)]
        for element in dataset.iterall():
            if element.VR == "UI" and isinstance(element.value, str) and element.value in references:
                element.value = references[element.value]
        dataset.SOPInstanceUID, dataset.SeriesInstanceUID = UID(instance_uid), UID(series_uid)
        dataset.file_meta.MediaStorageSOPInstanceUID = UID(instance_uid)
        dataset.file_meta.MediaStorageSOPClassUID = UID(str(dataset.SOPClassUID))
        _check_encodes(dataset)
    return tuple(ordered)


def _read(file: WrittenFile) -> Dataset:
    try:
        dataset = dcmread(BytesIO(file.content))
        for _ in dataset.iterall():  # pydicom reads elements when they are asked for; a damaged one is found here
            pass
    except (InvalidDicomError, ValueError, KeyError, OSError, EOFError, NotImplementedError, AttributeError) as reason:
        raise OutputRefused(f"{file.name} is not a DICOM object ({type(reason).__name__})") from None
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not is_uid(str(dataset.get(keyword) or "")):
            raise OutputRefused(f"{file.name} has no valid {keyword}")
    if not is_uid(str(dataset.file_meta.get("TransferSyntaxUID") or "")):
        raise OutputRefused(f"{file.name} has no TransferSyntaxUID in its file meta information (PS3.10 7.1)")
    sop_class = str(dataset.SOPClassUID)
    if sop_class in UID_dictionary and _STORAGE not in UID(sop_class).name:
        raise OutputRefused(f"{file.name} is of the class {UID(sop_class).name}, which is not stored")
    return dataset


def _check_subject(dataset: Dataset, reference: Dataset, name: str) -> None:
    """Refuse another study, or a patient who is not the input's; no value of either is told."""
    if str(dataset.StudyInstanceUID) != str(reference.StudyInstanceUID):
        raise OutputRefused(
            f"{name} belongs to study {dataset.StudyInstanceUID}, the input to {reference.StudyInstanceUID}: "
            "no result is taken from a model that mixes studies"
        )
    for keyword in _SAME_PATIENT:
        found, expected = (_plain(source.get(keyword)) for source in (dataset, reference))
        if found and found != expected:
            raise OutputRefused(f"{name} has another {keyword} than its input: it is not taken for this patient's")


def _fill(dataset: Dataset, reference: Dataset) -> None:
    """What is empty of patient and study as the input has it, with all of its letters."""
    empty = [keyword for keyword in _FILLED if keyword in reference and not str(dataset.get(keyword) or "")]
    if not all(str(reference.get(keyword) or "").isascii() for keyword in empty):
        dataset.decode()  # by the object's own character set, which may not hold them (PS3.3 C.12.1.1.2)
        dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword in empty:
        dataset[keyword] = reference[keyword]


def _plain(value: object) -> str:
    """A name or ID without the padding and case that programs change; empty name components at the end are nothing."""
    return re.sub(r"\s+", " ", str(value or "")).strip(" ^=").casefold()


def _order(dataset: Dataset) -> tuple[object, ...]:
    """By what a repetition of the job gives again: never by UIDs, times or the names of files."""

    def number(keyword: str) -> float:
        try:
            return float(str(dataset.get(keyword) or 0))
        except ValueError:
            return 0.0

    return (
        str(dataset.SOPClassUID),
        str(dataset.get("Modality") or ""),
        number("SeriesNumber"),
        str(dataset.get("SeriesDescription") or ""),
        number("InstanceNumber"),
        [float(value) for value in dataset.get("ImagePositionPatient") or ()],
        _fingerprint(dataset),
    )


def _fingerprint(dataset: Dataset) -> str:
    """The content without what differs between repetitions: UIDs, dates and times."""
    digest = hashlib.sha256()
    for element in dataset.iterall():
        if element.VR not in ("UI", "DA", "TM", "DT", "SQ"):
            digest.update(f"{element.tag}{element.VR}".encode())
            digest.update(element.value if isinstance(element.value, bytes) else str(element.value).encode())
    return digest.hexdigest()


def _derive_uids(ordered: Sequence[Dataset], key: str) -> dict[str, str]:
    """The program's own Series and SOP Instance UIDs to those of the job."""
    renamed: dict[str, str] = {}
    series: dict[str, int] = {}
    for index, dataset in enumerate(ordered):
        number = series.setdefault(str(dataset.SeriesInstanceUID), len(series))
        renamed[str(dataset.SOPInstanceUID)] = derive_uid(key, "object", str(index))
        renamed.setdefault(str(dataset.SeriesInstanceUID), derive_uid(key, "series", str(number)))
    return renamed


def _check_encodes(dataset: Dataset) -> None:
    try:
        with pydicom_config.disable_value_validation():
            dataset.save_as(BytesIO(), enforce_file_format=True)
    except Exception as reason:  # pydicom raises many kinds for a data set that it can read and not write
        raise OutputRefused(
            f"an object of class {UID(str(dataset.SOPClassUID)).name} cannot be written as a DICOM file "
            f"({type(reason).__name__})"
        ) from None


def looks_like_dicom(path: Path) -> bool:
    """Whether the file has DICOM's preamble (PS3.10 7.1) or a name that says so."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")
