"""The life of the receiving process: a C-STORE and C-ECHO SCP that answers Success only for what is durable."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from io import BytesIO

from pydicom import dcmread
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import AE, AllStoragePresentationContexts, evt
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.sop_class import Verification  # pyright: ignore[reportAttributeAccessIssue]

from node.archive.store import Archive
from node.dicom.identity import IDENTITY_KEYWORDS, read_identity
from node.errors import ArchiveError, ArchiveFull
from node.receive.admission import Admission

_log = logging.getLogger(__name__)

BIND_PATIENCE_S = 30.0
DRAIN_S = 30.0

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DATASET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000


def receive_until(
    stop: threading.Event,
    archive: Archive,
    admission: Admission,
    host: str,
    port: int,
    *,
    maximum_associations: int,
    ready: Callable[[], None],
) -> None:
    """Serve until `stop` is set; then accept nobody new and let open associations end, for `DRAIN_S` at most."""
    ae = AE(ae_title=admission.called_ae_title)
    ae.maximum_associations = maximum_associations
    ae.maximum_pdu_size = 131072
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(context.abstract_syntax or "", AllTransferSyntaxes)
    ae.add_supported_context(Verification)
    handlers = [(evt.EVT_REQUESTED, _admit, [admission]), (evt.EVT_C_STORE, _store, [archive])]
    server = _bind(ae, host, port, handlers)
    ready()
    stop.wait()
    server.server_close()
    deadline = time.monotonic() + DRAIN_S
    while ae.active_associations and time.monotonic() < deadline:
        time.sleep(0.05)
    server.shutdown()


def _bind(ae: AE, host: str, port: int, handlers: list):
    """Listen; a predecessor that is still draining keeps the port for a while."""
    deadline = time.monotonic() + BIND_PATIENCE_S
    while True:
        try:
            server = ae.start_server((host, port), block=False, evt_handlers=handlers)
            assert server is not None  # it is when it does not block
            return server
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _admit(event: evt.Event, admission: Admission) -> None:
    request = event.assoc.requestor.primitive
    assert isinstance(request, A_ASSOCIATE)
    address = event.assoc.requestor.address or ""
    refusal = admission.refusal(request.called_ae_title or "", request.calling_ae_title or "", address)
    if refusal:
        _log.warning("association refused: %s", refusal)
        reason = 0x07 if refusal.startswith("called") else 0x03
        event.assoc.acse.send_reject(0x01, 0x01, reason)
        event.assoc.kill()


def _store(event: evt.Event, archive: Archive) -> int:
    encoded = event.encoded_dataset()
    body = event.request.DataSet.getbuffer()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    try:
        dataset = dcmread(BytesIO(encoded), stop_before_pixels=True, specific_tags=list(IDENTITY_KEYWORDS))
        identity = read_identity(dataset, event.context.transfer_syntax)
    except Exception as error:  # whatever pydicom raises over hostile bytes means that they cannot be understood
        _log.warning("C-STORE from %s refused: %s", event.assoc.requestor.ae_title, error)
        return CANNOT_UNDERSTAND
    if identity.sop_class_uid != event.context.abstract_syntax:
        return DATASET_MISMATCH
    try:
        with archive.spool_file() as spooled:
            spooled.write(encoded[: len(encoded) - len(body)], hashed=False)
            spooled.write(body)
            archive.keep_instance(spooled, identity, str(event.assoc.requestor.ae_title).strip())
    except ArchiveError as error:
        kind = "archive full" if isinstance(error, ArchiveFull) else "archive"
        _log.error("C-STORE of %s not acknowledged, %s: %s", identity.sop_instance_uid, kind, error)
        return OUT_OF_RESOURCES
    with contextlib.suppress(BufferError):
        body.release()
    return SUCCESS
