"""A peer spoken to as its client: C-ECHO, C-STORE of files on one association, and storage commitment both ways."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID
from pynetdicom import _config, build_role
from pynetdicom.events import EVT_N_EVENT_REPORT, EVT_PDU_SENT, Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,  # pyright: ignore[reportAttributeAccessIssue]
    Verification,  # pyright: ignore[reportAttributeAccessIssue]
)

from node.association import ANSWER_TIMEOUT_S, LITTLE_ENDIAN, Address, Connection
from node.deliver.remarks import clean_comment
from node.dicom.commitment import WELL_KNOWN_INSTANCE, Request
from node.dicom.commitment_messages import request_of
from node.dicom.encode import candidates, compress
from node.dicom.uid import name_uid
from node.errors import DeliveryError

_ACTION_REQUEST = 1  # Action Type ID "Request Storage Commitment"
_MOST_CONTEXTS = 128  # of an association: their identifiers are the odd numbers of a byte (PS3.8 9.3.2.2)

# Files go out in pieces as they lie, never as one message in memory.
_config.STORE_SEND_CHUNKED_DATASET = True

_log = logging.getLogger(__name__)


def echo(address: Address) -> float:
    """C-ECHO; seconds from the request for an association to the answer. `DeliveryError` says what the peer did
    instead.
    """
    started = time.monotonic()
    with Connection(address, [(Verification, LITTLE_ENDIAN)]) as association:
        status = association.send_c_echo()
    _demand_success(status, f"{address} accepted the association but answered C-ECHO")
    return time.monotonic() - started


def ask_storage(address: Address, sop_classes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which of these storage classes a peer takes, each with the transfer syntaxes of ours that it takes (none: it does
    not), by offering them on an association that carries nothing.
    """
    offered = list(sop_classes)
    # With a class that every peer takes, so that the association comes about whatever it says of the others.
    contexts = [
        (Verification, LITTLE_ENDIAN),
        *((sop_class, (syntax,)) for sop_class in offered for syntax in LITTLE_ENDIAN),
    ]
    with Connection(address, contexts) as association:
        accepted = [
            (context.abstract_syntax, str(context.transfer_syntax[0])) for context in association.accepted_contexts
        ]
    return {each: tuple(syntax for sop_class, syntax in accepted if sop_class == each) for each in offered}


def report_commitment(address: Address, report: Dataset, event_type_id: int) -> None:
    """N-EVENT-REPORT of Storage Commitment, we being the SCP; `DeliveryError` when the peer did not take it."""
    role = build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)
    with Connection(address, [(StorageCommitmentPushModel, LITTLE_ENDIAN)], [role]) as association:
        try:
            status, _ = association.send_n_event_report(
                report, event_type_id, StorageCommitmentPushModel, WELL_KNOWN_INSTANCE
            )
        except (RuntimeError, ValueError) as error:
            raise DeliveryError(f"could not report to {address}: {error}") from error
    _demand_success(status, f"{address} answered the storage commitment report")


def ask_commitment(
    address: Address, request: Request, hear: Callable[[int, Dataset], int], *, patience_s: float
) -> None:
    """N-ACTION of Storage Commitment (PS3.4 J.3.2): ask the peer to answer for what `request` names.

    Its report may come on this association within `patience_s` seconds: `hear` gets the event type and the data set, in
    a thread of pynetdicom's, and returns the status of the answer. Later, it comes on an association of the peer's own.
    `DeliveryError` when the peer did not take the request.
    """
    heard, answered = threading.Event(), threading.Event()

    def take_report(event: Event) -> tuple[int, None]:
        try:
            return hear(event.event_type or 0, event.event_information), None
        finally:
            heard.set()

    def note_sent(event: Event) -> None:
        # pynetdicom would release before its other thread has sent the answer to the report.
        if heard.is_set() and isinstance(event.pdu, P_DATA_TF):
            answered.set()

    contexts: list[tuple[str, tuple[str, ...]]] = [(StorageCommitmentPushModel, LITTLE_ENDIAN)]
    handlers = [(EVT_N_EVENT_REPORT, take_report), (EVT_PDU_SENT, note_sent)]
    with Connection(address, contexts, handlers=handlers) as association:
        try:
            status, _ = association.send_n_action(
                request_of(request), _ACTION_REQUEST, StorageCommitmentPushModel, WELL_KNOWN_INSTANCE
            )
        except (RuntimeError, ValueError) as error:
            raise DeliveryError(f"could not ask {address} for storage commitment: {error}") from error
        _demand_success(status, f"{address} answered the storage commitment request")
        until = time.monotonic() + patience_s
        while association.is_established and time.monotonic() < until and not answered.wait(0.05):
            pass


def _demand_success(status: Dataset, answered: str) -> None:
    code = status.get("Status")
    if code != 0x0000:
        raise DeliveryError(f"{answered} with " + ("no answer" if code is None else f"status 0x{code:04X}"))


class StoreSession:
    """One association over which several objects are stored; a context manager."""

    def __init__(self, address: Address, files: Iterable[Path], *, compress: bool = False):
        """Negotiate for the SOP class and transfer syntax of each of `files`, and for plain little endian beside it.

        With `compress`, also for the syntaxes that would make each smaller: an object is then sent in the best one that
        the peer takes (`node.dicom.encode.candidates`), where it does get smaller, else as it is.
        """
        wanted: dict[str, set[str]] = {}
        smaller: dict[tuple[str, str], None] = {}
        for file in files:
            meta = read_file_meta_info(file)
            sop_class = meta.MediaStorageSOPClassUID
            wanted.setdefault(sop_class, set()).add(meta.TransferSyntaxUID)
            if compress:
                smaller |= dict.fromkeys((sop_class, syntax) for syntax in _candidates(file))
        contexts = []
        for sop_class, syntaxes in sorted(wanted.items()):
            # One context for each compressed syntax, so that accepting one does not exclude the others.
            contexts += [(sop_class, (syntax,)) for syntax in sorted(syntaxes - set(LITTLE_ENDIAN))]
            contexts.append((sop_class, LITTLE_ENDIAN))
        better = [(sop_class, (syntax,)) for sop_class, syntax in smaller if syntax not in wanted[sop_class]]
        contexts += better[: max(0, _MOST_CONTEXTS - len(contexts))]
        self._address = address
        self._compress = compress
        self._connection = Connection(address, contexts)

    def __enter__(self) -> StoreSession:
        self._association = self._connection.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.__exit__(kind, error, trace)

    @property
    def is_open(self) -> bool:
        """Whether more can be sent."""
        return self._association.is_established

    def send(self, file: Path) -> str:
        """Store one file; the peer's remark ("" for plain Success, a sentence for a warning).

        `DeliveryError` otherwise; it is permanent when the peer understood the request and will never take this object.
        """
        try:
            meta = read_file_meta_info(file)
            sop_class, syntax = meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID
            contexts = self._association.accepted_contexts
            accepted = {context.transfer_syntax[0] for context in contexts if context.abstract_syntax == sop_class}
            if not accepted:
                raise DeliveryError(
                    f"{self._address} does not accept {name_uid(sop_class)}: enable that SOP class at the peer"
                )
            if syntax not in accepted and syntax not in LITTLE_ENDIAN:
                raise DeliveryError(f"{self._address} does not accept {name_uid(sop_class)} as {syntax.name}")
            answer = self._store(file, syntax, accepted)
        except OSError as error:
            raise DeliveryError(f"{file.name} cannot be read ({error.strerror or type(error).__name__})") from error
        except (RuntimeError, ValueError, AttributeError) as error:
            raise DeliveryError(f"could not send to {self._address}: {error}") from error
        code = answer.get("Status")
        if code is None:
            raise DeliveryError(f"{self._address} broke off or did not answer within {ANSWER_TIMEOUT_S:.0f} s")
        return judge_status(code, clean_comment(str(answer.get("ErrorComment") or ""), file), self._address)

    def _store(self, file: Path, syntax: UID, accepted: set[UID]) -> Dataset:
        """Compressed where that is wanted and smaller, else as it lies where the peer takes that, else re-encoded
        between explicit and implicit VR.
        """
        best = next((each for each in _candidates(file) if each in accepted), None) if self._compress else None
        if best is not None:
            with ExitStack() as stack:
                smaller = _compressed(file, best, stack)
                if smaller is not None:
                    return self._association.send_c_store(smaller, priority=0)
        return self._association.send_c_store(file if syntax in accepted else _read(file), priority=0)


def _read(file: Path) -> Dataset:
    try:
        return dcmread(file)
    except OSError:
        raise
    except Exception as error:  # pydicom raises many kinds over a damaged file, and quotes what stands there
        raise DeliveryError(
            f"{file.name} is damaged ({type(error).__name__}): reprocess the study", permanent=True
        ) from error


def _candidates(file: Path) -> tuple[UID, ...]:
    """What would make the object smaller; nothing where that cannot be told, which is no reason not to send it."""
    try:
        return candidates(file)
    except Exception as error:  # as in `_read`
        _log.warning("%s is sent as it is: its header cannot be read (%s)", file.name, type(error).__name__)
        return ()


def _compressed(file: Path, syntax: UID, stack: ExitStack) -> Path | None:
    """The object in a file that goes with `stack`; None where that cannot be made or is no smaller: an encoder does not
    take it, or there is no room for temporary files. What is to be sent as it is arrives all the same.
    """
    try:
        # Nobody else can look into the folder.
        folder = stack.enter_context(TemporaryDirectory(prefix="radnode-", ignore_cleanup_errors=True))
        target = Path(folder) / "compressed.dcm"
        compress(file, target, syntax)
        return target if target.stat().st_size < file.stat().st_size else None
    except OSError as error:
        why = f"no temporary file could be written ({error.strerror or type(error).__name__})"
    except Exception as error:  # pydicom's or an encoder's: of many kinds, and they quote what the object holds
        why = f"it cannot be compressed ({type(error).__name__})"
    _log.warning("%s is sent as it is, not as %s: %s", file.name, syntax.name, why)
    return None


def judge_status(code: int, comment: str, address: Address) -> str:
    """The remark of a C-STORE status that means stored (PS3.4 B.2.3, PS3.7 C); `DeliveryError` for all others."""
    if code == 0x0000:
        return ""
    said = f"status 0x{code:04X}" + (f" ({comment})" if comment else "")
    if code in (0xB000, 0xB006, 0xB007, 0x0001, 0x0107, 0x0116):
        return f"stored with a warning, {said}"
    if code == 0x0111:  # duplicate SOP instance: the peer has it
        return f"already there, {said}"
    # A9xx, Cxxx and 'SOP class not supported' speak of the object; all else (A7xx among it) of the peer's present
    # state.
    permanent = 0xA900 <= code <= 0xA9FF or 0xC000 <= code <= 0xCFFF or code in (0x0117, 0x0122)
    raise DeliveryError(f"{address} answered {said}", permanent=permanent)
