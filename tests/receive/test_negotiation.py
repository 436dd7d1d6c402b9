"""What an association is agreed to be: contexts, transfer syntaxes, roles, the asynchronous window."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
)
from pynetdicom import build_context, build_role
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    UserIdentityNegotiation,
)

from node.receive.negotiation import Agreement, negotiate
from node.receive.wire import Violation
from tests.receive.conftest import Door

VERIFICATION, COMMITMENT = "1.2.840.10008.1.1", "1.2.840.10008.1.20.1"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
HTJ2K, DEFLATED_FRAME = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.8.1"
NEW_STANDARD_CLASS = "1.2.840.10008.5.1.4.1.1.9999"


def ask(
    contexts: list[tuple[str, list[str]]], extra: Sequence[object] = (), **how: object
) -> tuple[Agreement, A_ASSOCIATE]:
    """Negotiate; the agreement and the A-ASSOCIATE-AC as the peer reads it."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = "CT1", "RADNODE"
    proposed = []
    for number, (abstract, syntaxes) in enumerate(contexts):
        context = build_context(abstract, syntaxes)
        context.context_id = 2 * number + 1
        proposed.append(context)
    request.presentation_context_definition_list = proposed
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = 4096
    implementation.implementation_class_uid = "1.2.3.4"
    request.user_information = [length, implementation, *extra]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    options = {"sop_classes": None, "accept_unknown": False, "maximum_pdu_bytes": 131072} | how
    agreement = negotiate(pdu.encode(), **options)  # pyright: ignore[reportArgumentType]
    answer = A_ASSOCIATE_AC()
    answer.decode(agreement.acceptance)
    return agreement, answer.to_primitive()


def results(answer: A_ASSOCIATE) -> list[int | None]:
    """Result of each context: 0 accepted, 3 abstract syntax, 4 transfer syntaxes not supported."""
    return [context.result for context in answer.presentation_context_definition_results_list]


def test_storage_verification_and_commitment_are_accepted_and_nothing_else() -> None:
    syntaxes = [ExplicitVRLittleEndian]
    agreement, answer = ask(
        [(uid, syntaxes) for uid in (VERIFICATION, COMMITMENT, CTImageStorage, STUDY_ROOT_FIND, "1.2.3.4.5")]
    )
    assert results(answer) == [0, 0, 0, 3, 3]
    assert sorted(agreement.contexts) == [1, 3, 5]
    assert agreement.peer_maximum_pdu_bytes == 4096
    assert answer.maximum_length_received == 131072


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([ImplicitVRLittleEndian], ImplicitVRLittleEndian),
        ([ImplicitVRLittleEndian, ExplicitVRLittleEndian], ExplicitVRLittleEndian),
        ([ExplicitVRBigEndian, ImplicitVRLittleEndian], ExplicitVRBigEndian),
        ([JPEG2000Lossless, ExplicitVRLittleEndian], JPEG2000Lossless),
        ([ExplicitVRLittleEndian, JPEGLosslessSV1], ExplicitVRLittleEndian),
        ([HTJ2K], HTJ2K),
        ([DEFLATED_FRAME], DEFLATED_FRAME),
    ],
)
def test_a_sender_keeps_its_compression_and_its_vrs(offered: list[str], chosen: str) -> None:
    agreement, _ = ask([(CTImageStorage, offered)])
    assert agreement.contexts[1].transfer_syntax == chosen


def test_an_unknown_transfer_syntax_is_refused() -> None:
    _, answer = ask([(CTImageStorage, ["1.2.3.4"]), (VERIFICATION, [JPEG2000Lossless])])
    assert results(answer) == [4, 4]


def test_private_and_newer_classes_when_they_are_allowed() -> None:
    contexts = [(uid, [ExplicitVRLittleEndian]) for uid in (NEW_STANDARD_CLASS, "1.3.12.2.1107.5.9.1", STUDY_ROOT_FIND)]
    assert results(ask(contexts)[1]) == [3, 3, 3]
    assert results(ask(contexts, accept_unknown=True)[1]) == [0, 0, 3]


def test_a_peers_own_list_of_classes() -> None:
    contexts = [(uid, [ExplicitVRLittleEndian]) for uid in (VERIFICATION, CTImageStorage, MRImageStorage)]
    assert results(ask(contexts, sop_classes={CTImageStorage})[1]) == [0, 0, 3]


def test_the_window_of_asynchronous_operations_is_one() -> None:
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked, window.maximum_number_operations_performed = 8, 0
    _, answer = ask([(CTImageStorage, [ExplicitVRLittleEndian])], [window])
    (answered,) = (
        item for item in answer.user_information if isinstance(item, AsynchronousOperationsWindowNegotiation)
    )
    assert (answered.maximum_number_operations_invoked, answered.maximum_number_operations_performed) == (1, 1)
    _, answer = ask([(CTImageStorage, [ExplicitVRLittleEndian])])
    assert not [item for item in answer.user_information if isinstance(item, AsynchronousOperationsWindowNegotiation)]


def test_of_the_roles_we_take_that_of_scp() -> None:
    both = build_role(CTImageStorage, scu_role=True, scp_role=True)
    agreement, answer = ask([(CTImageStorage, [ExplicitVRLittleEndian])], [both])
    (role,) = (item for item in answer.user_information if isinstance(item, SCP_SCU_RoleSelectionNegotiation))
    assert (role.sop_class_uid, role.scu_role, role.scp_role) == (CTImageStorage, True, False)
    assert 1 in agreement.contexts


def test_a_peer_that_would_only_be_scp_has_no_context() -> None:
    only_scp = build_role(CTImageStorage, scu_role=False, scp_role=True)
    agreement, _ = ask([(CTImageStorage, [ExplicitVRLittleEndian])], [only_scp])
    assert agreement.contexts == {}


def test_user_identity_is_not_asked_for_and_does_no_harm() -> None:
    identity = UserIdentityNegotiation()
    identity.user_identity_type, identity.primary_field = 1, b"user"
    agreement, _ = ask([(CTImageStorage, [ExplicitVRLittleEndian])], [identity])
    assert 1 in agreement.contexts


@pytest.mark.parametrize("damage", [b"", b"\x01\x00", b"\xff" * 80])
def test_what_is_no_request_is_a_violation(damage: bytes) -> None:
    with pytest.raises(Violation):
        negotiate(damage, sop_classes=None, accept_unknown=False, maximum_pdu_bytes=16384)


def test_dcmtk_with_128_contexts(shared_door: Door, shared_data: Path) -> None:
    """storescu without -R proposes as many classes as fit."""
    images = shared_data / "abdomen_ct_ge"
    command = ["storescu", "-v", "-aec", "RADNODE", "+sd", "+r", "127.0.0.1", str(shared_door.port), images]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
