"""`radnode check`: is this machine ready? Everything is looked at, and everything that is wrong is said at once."""

from __future__ import annotations

import os
import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from node.commands.output import local_time, print_json, print_table
from node.config import Config, Route, find_config, load_config
from node.errors import ConfigError, DeliveryError, RadnodeError
from node.report.kinds import Kind

if TYPE_CHECKING:
    from node.deliver.dimse import Address


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Literal["good", "note", "wrong"]
    says: str


def check(options: Namespace) -> int:
    """Print the findings; 1 when something is wrong."""
    findings: list[Finding] = []
    try:
        path = find_config(options.config)
        config = load_config(path)
    except ConfigError as error:
        findings += [Finding("configuration", "wrong", str(problem)) for problem in error.problems]
    else:
        findings.append(
            Finding("configuration", "good", f"{path}, {len(config.routes)} routes, {len(config.peers)} peers")
        )
        for look in (
            look_at_storage,
            _models,
            _routes,
            _peers,
            _ports,
            _tls,
            _web,
            _accelerator,
            _cluster,
            _protections,
        ):
            findings += look(config)
    if options.json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table([asdict(finding) for finding in findings], ["what", "verdict", "says"], empty="")
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0


def look_at_storage(config: Config) -> Iterator[Finding]:
    """The folder, its disk and the database in use: what is paused, and what holds old studies."""
    storage = config.node.storage
    place = next(folder for folder in (storage, *storage.parents) if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("storage", "wrong", f"{place} is not writable for this user (node.storage: {storage})")
        return
    disk = shutil.disk_usage(place)
    wanted = config.keep.free_disk.wanted_bytes(disk.total)
    says = f"{storage}: {disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB, {wanted / 1e9:.1f} GB are kept free"
    yield Finding("storage", "good" if disk.free > wanted else "wrong", says)
    try:
        if storage.exists():
            from node.archive.open import open_archive
            from node.archive.retention import count_kept
            from node.queue.pauses import list_pauses

            archive = open_archive(config)
            yield Finding("database", "good", "opens, schema as expected")
            for pause in list_pauses(archive.database):
                yield Finding("queue", "note", f"{pause} (since {local_time(pause.since)})")
            kept = count_kept(archive.database, time.time() - config.keep.studies_s)
            if kept.studies:
                says = f"{kept.studies} studies are older than keep.studies and stay: {kept}"
                yield Finding("retention", "note", f"{says} (docs/operations.md, Old studies that stay)")
            archive.close()
    except RadnodeError as error:
        yield Finding("database", "wrong", str(error))


def _models(config: Config) -> Iterator[Finding]:
    from node.infer.package import check_trusted, discover_packages

    packages, errors = discover_packages(config.models.paths)
    for error in errors:
        yield Finding("models", "wrong", str(error))
    for package in packages:
        try:
            check_trusted(package, config.models.trusted)
        except RadnodeError as error:
            yield Finding("models", "wrong", str(error))
        else:
            pinned = "pinned" if package.name in config.models.trusted else "not pinned in models.trusted"
            yield Finding("models", "good", f"{package.name} {package.version}, {pinned}")


def _routes(config: Config) -> Iterator[Finding]:
    from node.infer.package import discover_packages

    known = {package.name for package in discover_packages(config.models.paths)[0]}
    for route in config.routes:
        for name in route.run:
            if name not in known:
                there = ", ".join(sorted(known)) or "none"
                yield Finding(
                    "routes",
                    "wrong",
                    f"route {route.name!r} runs {name}, there is no such package (there are: {there})",
                )


def _peers(config: Config) -> Iterator[Finding]:
    from node.deliver.dimse import echo
    from node.deliver.peers import destinations

    for name, peer in destinations(config).items():
        if gets_reports_alone(config, name):
            says = (
                "gets reports (sr) without the segmentations (seg) that they refer to: numbers are in them, "
                "outlines are not (docs/results.md, A report without its segmentation)"
            )
            yield Finding(f"peer {name}", "note", says)
        try:
            seconds = echo(peer.address)
            refused = _refused(config, name, peer.address)
        except DeliveryError as error:
            yield Finding(f"peer {name}", "wrong", str(error))
            continue
        yield Finding(f"peer {name}", "good", f"{peer.address} answered C-ECHO in {seconds * 1000:.0f} ms")
        for what in refused:
            yield Finding(
                f"peer {name}", "wrong", f"does not accept {what}, which a route sends it: enable that SOP class there"
            )


def _refused(config: Config, name: str, address: Address) -> list[str]:
    """The names of the classes of results that a peer would get and does not take."""
    from node.deliver.dimse import ask_storage
    from node.dicom.uid import name_uid
    from node.report.kinds import storage_classes

    kinds = {kind for route in config.routes for kind in _sent(config, route, name)}
    wanted = storage_classes(kinds, config.peers[name].seg)
    if not wanted:
        return []
    return [name_uid(each) for each, syntaxes in ask_storage(address, wanted).items() if not syntaxes]


def gets_reports_alone(config: Config, name: str) -> bool:
    """Whether a route sends a peer reports and not the segmentations that they may refer to."""
    sent = [_sent(config, route, name) for route in config.routes]
    return any(Kind.SR in kinds and Kind.SEG not in kinds for kinds in sent)


def _sent(config: Config, route: Route, name: str) -> set[Kind]:
    """The kinds of results that a route sends a peer."""
    taken = config.peers[name].results
    kinds = set(route.results) if name in route.send_to else set()
    return kinds if taken is None else kinds & set(taken)


def _ports(config: Config) -> Iterator[Finding]:
    doors = [("port", config.node.host, config.node.port)]
    if config.receive.tls is not None:
        doors.append(("TLS port", config.node.host, config.receive.tls.port))
    if config.web is not None:
        doors.append(("web port", *config.web.listen))
    for what, host, port in doors:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError:
                says = f"this user may not listen on port {port}: see docs/install.md, port 104"
                yield Finding(what, "wrong", says)
            except OSError as error:
                yield Finding(what, "note", f"{host}:{port} is taken ({error.strerror}): by a running radnode?")
            else:
                yield Finding(what, "good", f"{host}:{port} is free")


def _tls(config: Config) -> Iterator[Finding]:
    tls = config.receive.tls
    if tls is None:
        return
    from node.receive.tls import server_context

    try:
        server_context(tls.certificate, tls.key, tls.client_authority)
    except RadnodeError as error:
        yield Finding("TLS", "wrong", str(error))
    else:
        yield Finding("TLS", "good", f"{tls.certificate} and its key fit; senders need one of {tls.client_authority}")


def _web(config: Config) -> Iterator[Finding]:
    if config.web is None or config.web.token_file is None:
        return
    from node.web.token import read_token

    try:
        read_token(config.web.token_file)
    except RadnodeError as error:
        yield Finding("web token", "wrong", str(error))
    else:
        yield Finding("web token", "good", f"{config.web.token_file} can be read")


def _accelerator(config: Config) -> Iterator[Finding]:
    from node.infer.device import choose_device

    try:
        device = choose_device(_local_device(config))
    except RadnodeError as error:
        yield Finding("accelerator", "wrong", str(error))
        return
    if device == "cpu":
        note = "" if config.workers.device == "cpu" else ": torch sees no CUDA device"
        yield Finding("accelerator", "note", f"models run on the CPU ({os.cpu_count()} cores){note}")
    else:
        import torch

        properties = torch.cuda.get_device_properties(device)
        yield Finding("accelerator", "good", f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _local_device(config: Config) -> str:
    """What is asked of this machine: with Ray it runs programs only, wherever it can."""
    return config.workers.device if config.workers.engine == "local" else "auto"


def _cluster(config: Config) -> Iterator[Finding]:
    workers = config.workers
    if workers.engine != "ray":
        return
    from node.infer.ray_cluster import connect, list_machines

    try:
        ray = connect(workers.address)
    except RadnodeError as error:
        yield Finding("Ray", "wrong", str(error))
        return
    machines = list_machines(ray)
    ray.shutdown()
    for machine in machines:
        yield Finding("Ray", "good", str(machine))
    slots = sum(machine.slots(workers.cpus, workers.slot_gpus) for machine in machines)
    asked = f"{workers.count} slots are asked for (workers.count), the cluster has room for {slots}"
    yield Finding("Ray", "good" if slots >= workers.count else "wrong" if not slots else "note", asked)


def _protections(config: Config) -> Iterator[Finding]:
    from node.infer.device import choose_device
    from node.infer.hosted import probe_protections

    try:
        protections = probe_protections(choose_device(_local_device(config)))
    except RadnodeError as error:
        yield Finding("protection", "wrong", str(error))
        return
    for protection in protections:
        yield Finding("protection", "good" if protection.holds else "note", f"models run with {protection}")
