"""OHIF and a PACS's DICOMweb behind one address of the loopback interface, as a hospital's web server would offer them.

A browser lets OHIF's decoders share memory only where the page is isolated from other origins, hence the two headers.
"""

from __future__ import annotations

import http.client
import mimetypes
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


def read_config(*additions: str) -> str:
    """OHIF's `app-config.js` that lies beside this, and the additions to it."""
    return "".join((Path(__file__).parent / name).read_text() for name in ("app-config.js", *additions))


class Origin:
    """The web server; a context manager."""

    def __init__(self, dist: Path, config: str, pacs_port: int):
        """Serve the folder `dist` with `config` as its `app-config.js`, and `/dicom-web` of the PACS at `pacs_port`."""
        handler = type("Handler", (_Handler,), {"dist": dist.resolve(), "config": config, "pacs_port": pacs_port})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="viewer's origin", daemon=True)

    @property
    def url(self) -> str:
        """Where it is, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    dist: Path
    config: str
    pacs_port: int
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web/"):
            self._ask_pacs()
        elif path == "/app-config.js":
            self._answer(200, "text/javascript", self.config.encode())
        else:
            file = (self.dist / path.lstrip("/")).resolve()
            if not (file.is_file() and file.is_relative_to(self.dist)):
                file = self.dist / "index.html"  # every address of the single-page application
            self._answer(200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes())

    def _ask_pacs(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.pacs_port, timeout=60)
        try:
            # Orthanc writes the addresses of bulk data with the host that it was asked as.
            asked = {"Host": self.headers["Host"], "Accept": self.headers.get("Accept", "*/*")}
            connection.request("GET", self.path, headers=asked)
            answer = connection.getresponse()
            self._answer(answer.status, answer.headers["Content-Type"] or "", answer.read())
        except ConnectionError:  # the browser has enough, as when its page is closed
            self.close_connection = True
        finally:
            connection.close()

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Not to the test's output."""
