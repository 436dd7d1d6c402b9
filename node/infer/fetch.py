"""Files over HTTP: resumed where a connection broke, bounded in size and time, and checked.

Only http and https are spoken, also after a redirect, through the proxy of the environment (`https_proxy`) where there
is one. What was received of a file stays beside it as `NAME.part` when the connection is lost, and the next attempt,
now or in another process, asks for the rest only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from node import __version__
from node.errors import FetchError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where that is known

_log = logging.getLogger(__name__)

_CHUNK = 1 << 18  # bytes
_HASHES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}  # hexadecimal digits to the algorithm


@dataclass(frozen=True)
class Limits:
    """How much and how long a transfer may be."""

    size_max: int = 20 * 10**9  # bytes
    silence_s: float = 30.0  # nothing arrived for so long: the connection is lost
    rate_min: float = 1000.0  # bytes per second, over `rate_window_s`: a slower connection counts as lost
    rate_window_s: float = 60.0
    attempts: int = 5  # in a row that brought (almost) nothing
    wait_s: float = 1.0  # before the second attempt; doubled each time


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Checksum:
    """What a file's content must hash to. MD5 and SHA-1 protect against damage, not against malice."""

    algorithm: str
    digest: str  # lower-case hexadecimal

    @classmethod
    def of(cls, text: str) -> Checksum:
        """From 32, 40, 64 or 128 hexadecimal digits, with `sha256:` or the like before them or not."""
        name, _, digits = text.strip().lower().rpartition(":")
        algorithm = _HASHES.get(len(digits), "")
        if not re.fullmatch(r"[0-9a-f]+", digits) or name not in ("", algorithm) or not algorithm:
            raise FetchError(f"{text.strip()[:140]!r} is no checksum: expected the 64 hexadecimal digits of a SHA-256")
        return cls(algorithm, digits)

    def check(self, file: Path, what: str) -> None:
        """Raise `FetchError` when the content of `file` is another; `what` names it to people."""
        try:
            with file.open("rb") as content:
                found = hashlib.file_digest(
                    content, lambda: hashlib.new(self.algorithm, usedforsecurity=False)
                ).hexdigest()
        except OSError as reason:
            raise FetchError(f"{file} cannot be read ({reason.strerror})") from None
        if found != self.digest:
            raise FetchError(
                f"{what} is damaged or another file: its {self.algorithm} is {found}, expected {self.digest}"
            )


def shown(url: str) -> str:
    """An address as it may be told and logged: without what may be secret, the user and the query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch_text(
    url: str,
    *,
    size_max: int = 10_000_000,
    limits: Limits = DEFAULT_LIMITS,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """A short document, whole; raises `FetchError`."""
    with tempfile.TemporaryDirectory(prefix="radnode-") as folder:
        file = Path(folder) / "document"
        download(url, file, limits=replace(limits, size_max=size_max), sleep=sleep)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise FetchError(f"{shown(url)} is not text") from None


def download(
    url: str,
    target: Path,
    *,
    checksum: Checksum | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress = lambda done, total: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """The file at `url` as `target`, whole and with that checksum; raises `FetchError`.

    When the connection is lost for good, what came stays as `TARGET.part` for the next call. A file that is too large
    or has another checksum does not stay.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            _lock(file, part)
            try:
                _receive(_Transfer(url, file, part, checksum is not None, limits, progress), sleep)
            except FetchError:
                if not _size(file):
                    _forget(part)
                raise
            if checksum is not None:
                try:
                    checksum.check(part, shown(url))
                except FetchError:
                    _forget(part)
                    raise
            part.rename(target)
            _note_of(part).unlink(missing_ok=True)
    except OSError as reason:
        raise FetchError(f"{shown(url)} cannot be written to {target.parent} ({reason.strerror})") from None


# -- One transfer ------------------------------------------------------------------------------------------------------


class _ConnectionLost(Exception):
    """This attempt is over; the next may bring more."""


@dataclass
class _Transfer:
    """What does not change between the attempts at one file."""

    url: str
    file: IO[bytes]  # the partial file, opened to append
    part: Path
    checked: bool  # the result will be compared with a checksum
    limits: Limits
    progress: Progress


@dataclass(frozen=True)
class _Note:
    """What is known of a partial file, kept beside it: only the rest of the same file may be appended."""

    url: str
    validator: str | None  # a strong ETag or a Last-Modified (RFC 9110 13.1.5)
    total: int | None


def _receive(transfer: _Transfer, sleep: Callable[[float], None]) -> None:
    failures = 0
    while True:
        before = _size(transfer.file)
        try:
            _attempt(transfer)
            return
        except _ConnectionLost as lost:
            came = _size(transfer.file)
            failures = 0 if came - before >= 1 << 20 else failures + 1
            if failures >= transfer.limits.attempts:
                kept = f"; the {came:,} bytes that came are kept, and the next attempt goes on from there"
                raise FetchError(
                    f"{shown(transfer.url)}: {lost}, {failures} times in a row{kept if came else ''}"
                ) from None
            wait_s = transfer.limits.wait_s * 2 ** max(failures - 1, 0)
            _log.info("%s: %s; trying again in %.0f s", shown(transfer.url), lost, wait_s)
            sleep(wait_s)


def _attempt(transfer: _Transfer) -> None:
    """Ask for what is missing and append it; returns when the file is whole."""
    have = _size(transfer.file)
    note = _read_note(transfer)
    if have and note is None:  # of another address, or of a server that cannot tell whether its file is still the same
        transfer.file.truncate(0)
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and note and note.validator:
        headers["If-Range"] = note.validator
    try:
        with _told(transfer.url), _open(transfer.url, headers, transfer.limits) as response:
            total = _begin(transfer, response, have, note)
            _copy(transfer, response, total)
    except _RangeUnsatisfiable as answer:
        if have and answer.total == have:
            return
        transfer.file.truncate(0)
        raise _ConnectionLost("the server's file is not the one of which a part was kept") from None


def _begin(transfer: _Transfer, response: http.client.HTTPResponse, have: int, note: _Note | None) -> int | None:
    """Look at what the server sends, make room for it, and give the size of the whole where it is known."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise FetchError(f"{shown(transfer.url)} comes encoded as {encoding!r}, which was not asked for")
    if response.headers.get_content_type() == "text/html":  # a log-in, a quota, a proxy's refusal
        raise FetchError(f"{shown(transfer.url)} answers with a web page in place of the file; open it in a browser")
    if response.status == http.client.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        total = int(found[2]) if found and found[2] != "*" else None
        if not found or int(found[1]) != have or (note and note.total not in (None, total)):
            transfer.file.truncate(0)
            raise _ConnectionLost("the server sent another part than was asked for")
    else:
        transfer.file.truncate(0)
        have = 0
        total = response.length
        _note_of(transfer.part).write_text(
            json.dumps(asdict(_Note(shown(transfer.url), _validator(response), total))), encoding="utf-8"
        )
    if total is not None and total > transfer.limits.size_max:
        _forget(transfer.part)
        raise FetchError(
            f"{shown(transfer.url)} has {total:,} bytes; more than {transfer.limits.size_max:,} are not taken"
        )
    if total is not None and total - have > (free := shutil.disk_usage(transfer.part.parent).free):
        raise FetchError(
            f"{shown(transfer.url)} needs {total - have:,} bytes, and {transfer.part.parent} has {free:,} free"
        )
    return total


def _copy(transfer: _Transfer, response: http.client.HTTPResponse, total: int | None) -> None:
    done = _size(transfer.file)
    limits = transfer.limits
    window_began, window_bytes = time.monotonic(), 0
    transfer.progress(done, total)
    while chunk := response.read1(_CHUNK):  # what there is: a full chunk could keep us waiting past the window
        done += len(chunk)
        window_bytes += len(chunk)
        if done > limits.size_max:
            _forget(transfer.part)
            raise FetchError(f"{shown(transfer.url)} goes on past {limits.size_max:,} bytes, more are not taken")
        try:
            transfer.file.write(chunk)
        except OSError as reason:
            if reason.errno == errno.ENOSPC:
                raise FetchError(f"the disk of {transfer.part.parent} is full after {done:,} bytes") from None
            raise
        transfer.progress(done, total)
        now = time.monotonic()
        if now - window_began >= limits.rate_window_s:
            if window_bytes / (now - window_began) < limits.rate_min:
                raise _ConnectionLost(f"the server sends less than {limits.rate_min:,.0f} bytes per second")
            window_began, window_bytes = now, 0
    transfer.file.flush()
    if total is not None and done != total:
        raise _ConnectionLost(f"the connection ended after {done:,} of {total:,} bytes")


def _validator(response: http.client.HTTPResponse) -> str | None:
    """By which the server can tell whether its file is still the same (RFC 9110 13.1.5); a weak ETag cannot."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _read_note(transfer: _Transfer) -> _Note | None:
    """The note of a partial file to which more may be appended."""
    try:
        note = _Note(**json.loads(_note_of(transfer.part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = note.url == shown(transfer.url)
    return note if same and (note.validator or transfer.checked) else None


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


def _size(file: IO[bytes]) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _lock(file: IO[bytes], part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino != part.stat().st_ino:  # finished by another since it was opened
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        raise FetchError(f"{part} is being written by another radnode; wait until it is done") from None


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _RangeUnsatisfiable(Exception):
    """416: the server has no bytes after those that were asked for."""

    def __init__(self, total: int | None):
        super().__init__()
        self.total = total


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https only, and never from https to http."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urljoin(req.full_url, headers.get("location") or headers.get("uri") or "")
        scheme = urlsplit(target).scheme.lower()
        if scheme not in ("http", "https") or (scheme == "http" and urlsplit(req.full_url).scheme.lower() == "https"):
            raise FetchError(f"{shown(req.full_url)} redirects to {shown(target)[:200]!r}, which is not followed")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _open(url: str, headers: dict[str, str], limits: Limits) -> http.client.HTTPResponse:
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{shown(url)!r} is not an address that begins with https:// or http://")
    opener = urllib.request.OpenerDirector()  # build_opener's would also read file:, ftp: and data:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(
        url, headers={"User-Agent": f"radnode/{__version__}", "Accept-Encoding": "identity", **headers}
    )
    response = opener.open(request, timeout=limits.silence_s)
    assert isinstance(response, http.client.HTTPResponse)
    return response


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """What urllib and http.client raise, as a lost connection where trying again may help, else as `FetchError`."""
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            found = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
            raise _RangeUnsatisfiable(int(found[1]) if found else None) from None
        says = f"the server answers {error.code} {http.client.responses.get(error.code, '')}".rstrip()
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _ConnectionLost(says) from None
        raise FetchError(f"{shown(url)}: {says}") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise FetchError(
                f"{shown(url)}: its certificate is not trusted ({error.reason.verify_message}); where a proxy of the "
                "house opens TLS, let SSL_CERT_FILE name its authority"
            ) from None
        raise _ConnectionLost(f"no connection ({_reason(error.reason)})") from None
    except TimeoutError:
        raise _ConnectionLost("the server is silent") from None
    except (http.client.InvalidURL, UnicodeError):
        raise FetchError(f"{shown(url)!r} is not a valid address") from None
    except http.client.HTTPException as error:
        raise _ConnectionLost(f"the connection ended or spoke no HTTP ({type(error).__name__})") from None
    except (ConnectionError, ssl.SSLError) as error:
        raise _ConnectionLost(f"the connection broke ({_reason(error)})") from None


def _reason(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
