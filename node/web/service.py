"""The life of the web process: STOW-RS and health over HTTP, by uvicorn and Starlette."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable

import uvicorn
from anyio import to_thread
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from node import __version__
from node.archive import schema
from node.archive.store import Archive
from node.config import Config
from node.receive.limits import Limits, Watermark
from node.receive.listener import listen
from node.web.stow import Stow
from node.web.token import read_token

_log = logging.getLogger(__name__)

_CONCURRENT_REQUESTS = 64  # more are answered 503
_KEEP_ALIVE_S = 15
_DRAIN_S = 60


def serve_until(stop: threading.Event, archive: Archive, config: Config, *, ready: Callable[[], None]) -> None:
    """Serve until `stop` is set; then requests that run are finished."""
    assert config.web is not None
    host, port = config.web.listen
    server = uvicorn.Server(
        uvicorn.Config(
            make_application(archive, config),
            log_config=None,
            access_log=False,
            limit_concurrency=_CONCURRENT_REQUESTS,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_DRAIN_S,
            server_header=False,
            lifespan="off",
        )
    )
    with listen(host, port) as door:
        thread = threading.Thread(target=server.run, args=([door],), name="web")
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        ready()
        while thread.is_alive() and not stop.wait(0.2):
            pass
        server.should_exit = True
        thread.join()


def make_application(archive: Archive, config: Config) -> ASGIApp:
    """The routes, behind the token where one is configured."""
    assert config.web is not None
    limits = Limits(maximum_object_bytes=config.receive.maximum_object_bytes)
    stow = Stow(archive, limits, Watermark(archive.storage, config.keep.free_disk))

    async def store(request: Request) -> Response:
        return await stow(request)

    async def health(_request: Request) -> Response:
        return await to_thread.run_sync(_health, archive)

    application = Starlette(
        routes=[
            Route("/health", health),
            Route("/dicom-web/studies", store, methods=["POST"]),
            Route("/dicom-web/studies/{study}", store, methods=["POST"]),
        ]
    )
    token = None if config.web.token_file is None else read_token(config.web.token_file)
    return application if token is None else _Guard(application, token)


def _health(archive: Archive) -> Response:
    """200 while the database answers, else 503."""
    try:
        with archive.database.read() as connection:
            connection.execute(select(schema.alembic_version.c.version_num)).first()
    except SQLAlchemyError as error:
        _log.error("health: database: %s", type(error).__name__)
        return JSONResponse({"status": "failing", "database": "does not answer", "version": __version__}, 503)
    return JSONResponse({"status": "serving", "version": __version__})


class _Guard:
    """Lets a request pass that carries the bearer token (RFC 6750); health needs none."""

    def __init__(self, application: ASGIApp, token: str):
        self._application = application
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("authorization", "").encode()
        if scope["path"] == "/health" or hmac.compare_digest(given, self._expected):
            await self._application(scope, receive, send)
            return
        client = (scope.get("client") or ("unknown",))[0]
        _log.warning("audit: HTTP request of %s refused: no or wrong token", client)
        refusal = JSONResponse({"error": "expected Authorization: Bearer TOKEN"}, 401, {"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)
