"""The TLS door with DCMTK: certificates on both sides, nothing older than TLS 1.2, and a silent peer costs nothing."""

from __future__ import annotations

import ssl
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.demo.pacs import free_port
from node.errors import RadnodeError
from node.receive.tls import server_context
from tests.benchmark.receivers import radnode
from tests.receive.conftest import Door
from tests.receive.peers import connect


def openssl(*words: str | Path) -> None:
    """One step of a certificate's making."""
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of node and client by it; a stranger's by another."""
    folder = tmp_path_factory.mktemp("certificates")
    for authority in ("authority", "foreign"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={authority}",
                "-keyout", folder / f"{authority}.key", "-out", folder / f"{authority}.pem")  # fmt: skip
    for name, authority in (("node", "authority"), ("client", "authority"), ("stranger", "foreign")):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-days", "2", "-in", folder / f"{name}.csr", "-CA", folder / f"{authority}.pem",
                "-CAkey", folder / f"{authority}.key", "-CAcreateserial", "-out", folder / f"{name}.pem")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def tls_door(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, int]]:
    """A receiver with a TLS door, and that door's port."""
    folder, port = tmp_path_factory.mktemp("tls") / "node", free_port()
    places = f"certificate: {certificates}/node.pem, key: {certificates}/node.key"
    tls = f", tls: {{port: {port}, {places}, client_authority: {certificates}/authority.pem}}"
    with radnode(folder, receive=tls) as receiver:
        yield Door(receiver, folder), port


def storescu(port: int, certificates: Path, name: str, images: Path) -> int:
    """Send over TLS with that certificate; DCMTK's exit code."""
    files = [certificates / f"{name}.key", certificates / f"{name}.pem"]
    command = ["storescu", "-aec", "RADNODE", "+tls", *files, "+cf", certificates / "authority.pem", "+sd", "+r"]
    done = subprocess.run([*command, "127.0.0.1", str(port), images], capture_output=True, check=False, timeout=60)
    return done.returncode


def test_dcmtk_stores_over_tls(tls_door: tuple[Door, int], certificates: Path, shared_data: Path) -> None:
    door, port = tls_door
    assert storescu(port, certificates, "client", shared_data / "chest_ct_siemens") == 0
    assert len(list((door.storage / "instances").rglob("*.dcm"))) == 60


def test_a_stranger_is_refused(tls_door: tuple[Door, int], certificates: Path, shared_data: Path) -> None:
    door, port = tls_door
    assert storescu(port, certificates, "stranger", shared_data / "abdomen_ct_ge") != 0
    assert "audit: TLS refused for 127.0.0.1" in door.log
    assert "Traceback" not in door.log


def _handshake(port: int, certificates: Path, *, certificate: bool, version: ssl.TLSVersion) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates / "authority.pem")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # old versions are what is tried
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, version
    context.set_ciphers("ALL:@SECLEVEL=0")
    if certificate:
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    with connect(port) as plain, context.wrap_socket(plain) as secured:
        secured.sendall(b"\x01\0\0\0\0\0")
        secured.recv(1)  # a missing certificate is told here by TLS 1.3
        return secured.version() or ""


def test_versions_and_the_certificate_that_is_asked_for(tls_door: tuple[Door, int], certificates: Path) -> None:
    _, port = tls_door
    for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
        assert _handshake(port, certificates, certificate=True, version=version) == name
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            _handshake(port, certificates, certificate=False, version=version)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        _handshake(port, certificates, certificate=True, version=ssl.TLSVersion.TLSv1_1)


def test_a_silent_tls_peer_keeps_nobody_out(tls_door: tuple[Door, int], certificates: Path, shared_data: Path) -> None:
    _, port = tls_door
    silent = [connect(port) for _ in range(20)]
    silent[0].sendall(b"\x16\x03\x01")
    assert storescu(port, certificates, "client", shared_data / "abdomen_ct_ge") == 0
    for connection in silent:
        connection.settimeout(15)
        assert connection.recv(100) == b"", "cut when its time is over"
        connection.close()


def test_a_wrong_certificate_file_is_named(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(RadnodeError, match=r"receive\.tls: .*authority\.pem and .*node\.key"):
        server_context(certificates / "authority.pem", certificates / "node.key", certificates / "authority.pem")
    with pytest.raises(RadnodeError, match="holds no certificates"):
        server_context(certificates / "node.pem", certificates / "node.key", tmp_path / "absent.pem")
