"""TLS for DICOM as PS3.15 B.9 wants it (the BCP 195 profile, RFC 9325): version 1.2 with forward secrecy, or 1.3, and
certificates on both sides.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from node.errors import RadnodeError

# RFC 9325 4.2, by OpenSSL's names; the suites of TLS 1.3 are all fit.
_CIPHERS = ":".join(
    (
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
    )
)


def server_context(certificate: Path, key: Path, client_authority: Path) -> ssl.SSLContext:
    """A context that asks every client for a certificate of `client_authority` (PEM files all three)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise RadnodeError(f"receive.tls: {certificate} and {key} are no certificate with its key: {error}") from error
    try:
        context.load_verify_locations(client_authority)
    except (OSError, ssl.SSLError) as error:
        raise RadnodeError(f"receive.tls: {client_authority} holds no certificates: {error}") from error
    return context
