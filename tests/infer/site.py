"""A web server of the tests' own, which does with a file whatever a network can do to it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Page:
    """What is served at one path."""

    body: bytes = b""
    etag: str | None = '"1"'
    modified: str | None = None
    ranges: bool = True  # whether Range is understood
    cuts: list[int] = field(default_factory=list)  # the connection ends after so many bytes, once for each
    statuses: list[int] = field(default_factory=list)  # answered in place of the page, once for each
    location: str | None = None  # a redirect to here
    endless: bool = False  # the body again and again, without a length
    length: bool = True  # whether the length is announced
    silent_after: int | None = None  # nothing more comes after so many bytes, until the site closes
    trickle_s: float | None = None  # a byte at a time, so far apart
    encoding: str | None = None
    kind: str = "application/octet-stream"
    shifted: bool = False  # a part that was asked for is answered with another one


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    path: str
    range: str | None
    if_range: str | None


class Site:
    """`pages` by path, such as `/bundle.zip`; what was asked for is in `asked`."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def put(self, path: str, body: bytes = b"", **how: Any) -> str:
        """Serve this; its address. A changed body has another ETag."""
        self.pages[path] = Page(body, **{"etag": f'"{hashlib.sha1(body).hexdigest()[:8]}"', **how})
        return self.url + path

    def ranges_asked(self, path: str) -> list[str | None]:
        return [asked.range for asked in self.asked if asked.path == path]


@contextmanager
def running_site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.closing.set()
        site.server.shutdown()
        site.server.server_close()
        thread.join()


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *details: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.close_connection = True
            site.asked.append(Asked(path, self.headers["Range"], self.headers["If-Range"]))
            page = site.pages.get(path)
            if page is None or page.statuses:
                self._answer(page.statuses.pop(0) if page else 404, {"Content-Length": "0"})
            elif page.location:
                self._answer(302, {"Location": page.location, "Content-Length": "0"})
            else:
                with suppress(BrokenPipeError, ConnectionResetError):
                    self._send(page)

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _send(self, page: Page) -> None:
            body, status, headers = page.body, 200, {"Connection": "close", "Content-Type": page.kind}
            validator = page.etag or page.modified
            if page.etag:
                headers["ETag"] = page.etag
            if page.modified:
                headers["Last-Modified"] = page.modified
            if page.encoding:
                headers["Content-Encoding"] = page.encoding
            wanted, on = self.headers["Range"], self.headers["If-Range"]
            if wanted and page.ranges and on in (None, validator):
                first = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if first >= len(body):
                    self._answer(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
                    return
                first = first + 1 if page.shifted else first
                status = 206
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                body = body[first:]
            if page.length and not page.endless:
                headers["Content-Length"] = str(len(body))
            self._answer(status, headers)
            if page.cuts:
                body = body[: page.cuts.pop(0)]
            if page.trickle_s is not None:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if site.closing.wait(page.trickle_s):
                        return
            elif page.silent_after is not None:
                self.wfile.write(body[: page.silent_after])
                self.wfile.flush()
                site.closing.wait(60)
            else:
                self.wfile.write(body)
                while page.endless and not site.closing.is_set():
                    self.wfile.write(body)

    return Handler
