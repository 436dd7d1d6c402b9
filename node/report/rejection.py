"""The withdrawal of results: a rejection note as of IHE's Imaging Object Change Management (RAD TF-2 4.66, IOCM).

A rejection note is a Key Object Selection Document whose title says why the objects that it refers to are no longer to
be used. An archive that knows IOCM hides or deletes them; to another it is a key object selection that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from highdicom import sr
from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from node.dicom.uid import derive_uid
from node.errors import NotAllowed
from node.report.house import House
from node.report.kinds import PLACES
from node.report.quiet import quietly
from node.report.seg import stamp
from node.report.source import complete_header
from node.report.subject import MANUFACTURER

_KEY_OBJECT_SELECTION = "1.2.840.10008.5.1.4.1.1.88.59"


class RejectionReason(StrEnum):
    """Why results are withdrawn, in words for people."""

    QUALITY = "quality"  # they are wrong or of no use; may still be shown to those who ask for rejected objects
    SAFETY = "safety"  # they may harm the patient, such as results of another patient's images: never to be shown
    WORKLIST = "worklist"  # the images were acquired under the wrong worklist entry, and so are of another patient
    RETENTION = "retention"  # their time to be kept is over


_TITLES = {  # CID 7010, 7031
    RejectionReason.QUALITY: codes.DCM.RejectedForQualityReasons,
    RejectionReason.SAFETY: codes.DCM.RejectedForPatientSafetyReasons,
    RejectionReason.WORKLIST: codes.DCM.IncorrectModalityWorklistEntry,
    RejectionReason.RETENTION: codes.DCM.DataRetentionPolicyExpired,
}


@dataclass(frozen=True)
class _Note:
    """When the note is written, and of what."""

    created: datetime
    sources: tuple[Dataset, ...]


def make_rejection(
    withdrawn: Sequence[Dataset],
    reason: RejectionReason,
    *,
    created: datetime,
    node_version: str,
    house: House | None = None,
    comment: str = "",
) -> Dataset:
    """The note that withdraws result objects, given as data sets or headers, at least one and all of one study.

    `created` is aware. Its UIDs follow from what is withdrawn and why: the same withdrawal is the same note. `comment`
    is for people and must hold nothing that identifies the patient. Raises `NotAllowed` for objects of several
    studies, which need a note each, and for a rejection note: who withdraws one sends its objects again.
    """
    objects = {str(each.SOPInstanceUID): each for each in withdrawn}
    ordered = [objects[uid] for uid in sorted(objects)]
    if not ordered:
        raise NotAllowed("there is nothing to withdraw: name at least one result object")
    studies = sorted({str(each.StudyInstanceUID) for each in ordered})
    if len(studies) > 1:
        raise NotAllowed(f"objects of {len(studies)} studies ({', '.join(studies)}): withdraw each study's alone")
    for each in ordered:
        if each.SOPClassUID == _KEY_OBJECT_SELECTION and _is_note(each):
            raise NotAllowed(f"object {each.SOPInstanceUID} is a rejection note, which cannot be withdrawn")
    key = ("rejection", reason, *sorted(objects))
    note = _Note(created, (complete_header(ordered[0], comment), *ordered[1:]))
    with quietly():
        content = KeyObjectSelection(
            document_title=_TITLES[reason],
            referenced_objects=ordered,
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                    uid=derive_uid("device", "radnode", node_version),
                    name=f"radnode {node_version}",
                    manufacturer_name=MANUFACTURER,
                ),
            ),
            description=comment or None,
        )
        rejection = KeyObjectSelectionDocument(
            evidence=note.sources,
            content=content,
            series_instance_uid=derive_uid(*key, "series"),
            series_number=(house or House()).series_number + len(PLACES),  # after the results' own
            sop_instance_uid=derive_uid(*key),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=MANUFACTURER,
            software_versions=f"radnode {node_version}",
            series_description=f"AI results withdrawn: {reason}",
        )
    stamp(rejection, note)
    del rejection.SeriesDate, rejection.SeriesTime  # of the Key Object Document Series module (PS3.3 C.17.6.1) no part
    return rejection


def _is_note(document: Dataset) -> bool:
    """Whether a key object selection is a rejection note, by its title."""
    titles = {title.value for title in _TITLES.values()}
    return any(str(code.get("CodeValue")) in titles for code in document.get("ConceptNameCodeSequence") or ())
