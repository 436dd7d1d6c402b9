"""The life of the receiving process: recover what a crash left, listen, and answer Success only for what is kept."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack

from node.archive.recover import note_clean_stop, recover
from node.archive.store import Archive
from node.config import Config
from node.receive.admission import Admission, Pace, Places, Sender
from node.receive.association import Services
from node.receive.commitment import Commitment
from node.receive.importer import WatchedFolder
from node.receive.limits import Limits, Watermark
from node.receive.listener import Listener, listen
from node.receive.storage import Storage
from node.receive.tls import server_context

_log = logging.getLogger(__name__)


def receive_until(stop: threading.Event, archive: Archive, config: Config, *, ready: Callable[[], None]) -> None:
    """Serve until `stop` is set; then accept nobody new and let senders end what they send."""
    told = recover(archive)
    if told:
        _log.warning("recovery: %s", told)
    watermark = Watermark(archive.storage, config.keep.free_disk)
    services = _services(archive, config, watermark)
    with ExitStack() as stack:
        stack.callback(services.storage.close)
        doors: list[tuple[socket.socket, ssl.SSLContext | None]] = [
            (stack.enter_context(listen(config.node.host, config.node.port)), None)
        ]
        if (tls := config.receive.tls) is not None:
            context = server_context(tls.certificate, tls.key, tls.client_authority)
            doors.append((stack.enter_context(listen(config.node.host, tls.port)), context))
        listener = Listener(services, doors)
        listener.start()
        watched = None
        if config.receive.watch is not None:
            watched = WatchedFolder(config.receive.watch, archive, services.limits, watermark, stop)
            watched.start()
        ready()
        stop.wait()
        listener.drain()
        if watched is not None:
            watched.join()
    note_clean_stop(archive)


def _services(archive: Archive, config: Config, watermark: Watermark) -> Services:
    receive, peers = config.receive, config.peers
    limits = Limits(
        maximum_per_address=receive.maximum_per_address,
        idle_s=receive.idle_s,
        maximum_object_bytes=receive.maximum_object_bytes,
    )
    senders = tuple(
        Sender(
            name=name,
            ae_title=peers[name].ae_title,
            host=peers[name].host,
            port=peers[name].port,
            maximum_associations=peers[name].maximum_associations,
            maximum_instances_s=peers[name].maximum_rate,
            sop_classes=None if (classes := peers[name].sop_classes) is None else frozenset(classes),
        )
        for name in receive.from_
    )
    # A destination may call to report on what we delivered, and send nothing.
    senders += tuple(
        Sender(name=name, ae_title=peer.ae_title, host=peer.host, port=peer.port, sop_classes=frozenset())
        for name, peer in peers.items()
        if peer.commitment and name not in receive.from_
    )
    return Services(
        Admission(
            config.node.ae_title,
            senders,
            check_called=receive.called_ae_check,
            accept_unknown_sop_classes=receive.unknown_sop_classes,
        ),
        Places(receive.maximum_associations, limits.maximum_per_address),
        Pace(),
        limits,
        Storage(archive, limits, watermark),
        Commitment(archive),
    )
