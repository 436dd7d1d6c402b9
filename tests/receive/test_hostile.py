"""A hostile network: each attack is answered as it must be, and afterwards a healthy sender gets Success at once."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydicom.uid import CTImageStorage

from tests.benchmark.receivers import Receiver, radnode
from tests.receive.conftest import Door
from tests.receive.peers import CT_CONTEXT, ECHO_CONTEXT, associate, association_request, connect, read_pdu
from tests.receive.sending import (
    command,
    ct,
    encode,
    pdus,
    read_status,
    release,
    store_command,
    store_dataset,
    store_message,
)
from tests.running_node import wait_until

ABORT, REJECT = b"\x07", b"\x03"
HANDSHAKE_S = 10  # Limits.handshake_s


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One receiver for all of them: what one attack leaves behind, the next would suffer from."""
    folder = tmp_path_factory.mktemp("hostile") / "node"
    with radnode(folder, receive=", maximum_object: 20MB") as receiver:
        yield Door(receiver, folder)


@pytest.fixture(autouse=True)
def healthy(door: Door) -> Iterator[None]:
    """After each attack: a sender is served within a second, and nothing of the attack is left."""
    process = door.receiver.process
    before = _load(process)
    yield
    began = time.monotonic()
    connection = associate(door.port)
    assert store_dataset(connection, ct())[0] == 0
    release(connection)
    assert time.monotonic() - began < 1.0
    wait_until(
        lambda: _load(process)[0] <= before[0] and _load(process)[1] <= before[1], 5, "no thread or file is left"
    )
    wait_until(lambda: not list((door.storage / "spool").iterdir()), 5, "an empty spool")
    assert "Traceback" not in door.log


def _load(process: psutil.Process) -> tuple[int, int]:
    return process.num_threads(), process.num_fds()


def ended(connection: socket.socket) -> bytes:
    """What the node says before it closes."""
    said = b""
    while pdu := read_pdu(connection):
        said = pdu
    connection.close()
    return said


def test_silent_sockets_keep_nobody_out(door: Door) -> None:
    silent = [connect(door.port) for _ in range(11)]
    for connection in silent:
        connection.sendall(b"\x01\x00\x00")
    busy = associate(door.port)
    assert store_dataset(busy, ct())[0] == 0
    release(busy)
    began = time.monotonic()
    assert [ended(connection) for connection in silent] == [b""] * 11
    assert time.monotonic() - began < HANDSHAKE_S + 2


def test_more_silent_sockets_than_places_keep_nobody_out(door: Door) -> None:
    silent = [connect(door.port) for _ in range(400)]
    busy = associate(door.port)
    assert store_dataset(busy, ct())[0] == 0
    release(busy)
    for connection in silent:
        connection.close()


def test_an_announced_4_gib_pdu_is_refused_before_it_is_read(door: Door) -> None:
    idle = door.receiver.process.memory_info().rss
    for pdu_type in (1, 2, 4, 5, 7, 9):
        connection = connect(door.port)
        connection.sendall(struct.pack(">BxL", pdu_type, 0xFFFFFFFF) + bytes(1000))
        assert ended(connection)[:1] == ABORT
    connection = associate(door.port)
    connection.sendall(struct.pack(">BxL", 4, 0xFFFFFFFF) + bytes(1000))
    assert ended(connection)[:1] == ABORT
    assert door.receiver.process.memory_info().rss - idle < 5e6


def test_a_pdu_longer_than_was_agreed_is_refused(door: Door) -> None:
    connection = associate(door.port)
    connection.sendall(struct.pack(">BxLLBB", 4, 131072 + 2, 131072 - 2, CT_CONTEXT, 3) + bytes(1000))
    assert ended(connection)[:1] == ABORT


def test_an_endless_data_set_is_cut(door: Door) -> None:
    connection = associate(door.port)
    image = ct()
    connection.sendall(pdus(CT_CONTEXT, store_command(CTImageStorage, image.SOPInstanceUID), is_command=True))
    connection.sendall(pdus(CT_CONTEXT, encode(image), is_command=False).replace(b"\x03\x02", b"\x03\x00"))
    piece = struct.pack(">BxLLBB", 4, 16006, 16002, CT_CONTEXT, 0) + bytes(16000)
    sent = 0
    try:
        while sent < 60_000_000:
            connection.sendall(piece)
            sent += 16000
    except OSError:
        pass
    assert sent < 40_000_000
    connection.close()
    wait_until(lambda: "a data set of more than 20000000 bytes" in door.log, 5, "the reason in the log")


def test_bytes_trickled_one_by_one_are_cut(door: Door) -> None:
    connection = connect(door.port)
    began = time.monotonic()
    request = association_request()
    try:
        for byte in request:
            connection.sendall(bytes([byte]))
            time.sleep(0.2)
    except OSError:
        pass
    assert time.monotonic() - began < HANDSHAKE_S + 3
    connection.close()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("how", ["abort", "close", "reset"])
def test_an_image_that_stops_half_way_leaves_nothing(door: Door, how: str, fraction: float) -> None:
    connection = associate(door.port)
    image = ct(PixelData=bytes(200_000))
    message = store_message(encode(image), CTImageStorage, image.SOPInstanceUID)
    connection.sendall(message[: int(len(message) * fraction)])
    if how == "abort":
        connection.sendall(struct.pack(">BxLxxBB", 7, 4, 0, 0))
    elif how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    with door.archive() as archive:
        assert archive.instance_paths([image.SOPInstanceUID]) == {}


def _pdv(context_id: int, control: int, data: bytes, *, length: int | None = None) -> bytes:
    length = len(data) + 2 if length is None else length
    return struct.pack(">BxLLBB", 4, len(data) + 6, length, context_id, control) + data


RELEASE = struct.pack(">BxL", 5, 4) + bytes(4)
ECHO = command({0x0002: b"1.2.840.10008.1.1\0", 0x0100: b"\x30\0", 0x0110: b"\1\0", 0x0800: b"\1\1"})
VIOLATIONS = {
    "a context that was not agreed": _pdv(99, 3, ECHO),
    "an even context": _pdv(2, 3, ECHO),
    "context 255": _pdv(255, 3, ECHO),
    "a value longer than its PDU": _pdv(1, 3, ECHO, length=100000),
    "a value shorter than its own header": _pdv(1, 3, ECHO, length=1),
    "a data set without a command": _pdv(1, 2, b"abc"),
    "an endless command": b"".join(_pdv(1, 1, bytes(4000)) for _ in range(8)),
    "a command that is none": _pdv(1, 3, b"\xff" * 40),
    "a command that is cut": _pdv(1, 3, ECHO[:-3]),
    "an empty command": _pdv(1, 3, b""),
    "a response": _pdv(1, 3, command({0x0100: b"\x30\x80", 0x0110: b"\1\0", 0x0800: b"\1\1"})),
    "another context within a command": _pdv(1, 1, ECHO[:20]) + _pdv(3, 3, ECHO[20:]),
    "a second request for an association": association_request(),
    "an unknown PDU": struct.pack(">BxL", 0x42, 4) + bytes(4),
    "a release within a message": _pdv(3, 3, store_command(CTImageStorage, "1.2.3")) + RELEASE,
}  # fmt: skip


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_of_the_protocol_is_aborted(door: Door, name: str) -> None:
    connection = associate(door.port)
    connection.sendall(VIOLATIONS[name])
    assert ended(connection)[:1] == ABORT


def test_an_unknown_command_is_answered(door: Door) -> None:
    connection = associate(door.port)
    for field in (b"\x20\0", b"\x21\0", b"\x40\x01", b"\x77\x07"):
        unknown = command({0x0002: b"1.2.840.10008.1.1\0", 0x0100: field, 0x0110: b"\1\0", 0x0800: b"\1\1"})
        connection.sendall(pdus(ECHO_CONTEXT, unknown, is_command=True))
        assert read_status(connection)[0] == 0x0211
    connection.sendall(pdus(ECHO_CONTEXT, ECHO, is_command=True))
    assert read_status(connection)[0] == 0
    release(connection)


def test_two_hundred_senders_at_once(door: Door) -> None:
    """More than a gateway opens; each stores, none is dropped."""
    statuses: list[int] = []

    def send() -> None:
        connection = associate(door.port)
        statuses.extend(store_dataset(connection, ct())[0] for _ in range(3))
        release(connection)

    threads = [threading.Thread(target=send) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [0] * 600


def test_a_full_node_says_come_again(tmp_path: Path) -> None:
    with radnode(tmp_path / "full") as receiver:
        held = [associate(receiver.port) for _ in range(300)]
        connection = connect(receiver.port)
        connection.sendall(association_request())
        answer = read_pdu(connection)
        assert answer[:1] == REJECT
        assert tuple(answer[7:10]) == (2, 3, 2)  # transient, by the presentation provider, local limit exceeded
        release(held.pop())
        wait_until(lambda: _is_accepted(receiver), 5, "a place")
        for each in held:
            each.close()


def _is_accepted(receiver: Receiver) -> bool:
    connection = connect(receiver.port)
    connection.sendall(association_request())
    accepted = read_pdu(connection)[:1] == b"\x02"
    connection.close()
    return accepted


def test_a_thousand_mutated_streams(door: Door) -> None:
    """Mutations of a valid association: no crash, no hang, no leak of threads, descriptors or memory."""
    process = door.receiver.process
    image = ct()
    parts = [association_request(), store_message(encode(image), CTImageStorage, image.SOPInstanceUID)]
    valid = b"".join([*parts, struct.pack(">BxL", 5, 4) + bytes(4)])
    chance = random.Random(20261121)
    for number in range(1000):
        if number == 100:
            warm = process.memory_info().rss
        connection = connect(door.port)
        try:
            connection.sendall(_mutated(valid, chance))
            connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            while connection.recv(65536):
                pass
            assert time.monotonic() - began < HANDSHAKE_S + 2
        except (ConnectionResetError, BrokenPipeError):
            pass
        connection.close()
    assert process.memory_info().rss - warm < 20e6


def _mutated(valid: bytes, chance: random.Random) -> bytes:
    stream = bytearray(valid)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(len(stream) or 1)
        match chance.randrange(5):
            case 0:
                stream[at : at + 1] = chance.randbytes(1)
            case 1:
                stream[at : at + chance.randrange(1, 60)] = b""
            case 2:
                stream[at:at] = chance.randbytes(chance.randrange(1, 60))
            case 3:
                stream[at : at + 4] = chance.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1")
                )
            case 4:
                del stream[at:]
                stream += b"\0"
    return bytes(stream)


def test_dcmtk_is_served_in_the_middle_of_all_this(door: Door, shared_data: Path) -> None:
    silent = [connect(door.port) for _ in range(50)]
    command_line = ["storescu", "-aec", "RADNODE", "+sd", "+r", "127.0.0.1", str(door.port)]
    done = subprocess.run([*command_line, shared_data / "abdomen_ct_ge"], timeout=20, check=False)
    assert done.returncode == 0
    for connection in silent:
        connection.close()
