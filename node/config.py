"""The node's configuration: `config.yaml` as typed, immutable values with their units in their names.

`load_config` is the only door: it also checks what no single field can know, and reports every mistake of the file at
once. The user's description of every field is `docs/configuration.md`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from node.config_values import (
    AbsolutePath,
    AETitle,
    Banner,
    ClusterAddress,
    DatabaseURL,
    Description,
    Device,
    Digest,
    Duration,
    FreeDisk,
    FreeSpace,
    Host,
    Listen,
    Name,
    Network,
    Port,
    ResolvedPath,
    SeriesNumber,
    Share,
    Size,
    StorageClass,
    WebAddress,
    parse_duration_s,
)
from node.dicom.conditions import When
from node.errors import ConfigError, Problem
from node.priority import Priority
from node.report.house import BANNER, DESCRIPTION, House, Language
from node.report.kinds import Kind
from node.yamlfile import Location, Number, Section, WholeNumber, listing_of, load_yaml, mapping_of, one_or_list

ENVIRONMENT = "RADNODE_CONFIG"
CONFIG_NAME = "config.yaml"
MODEL_ZOO = "https://raw.githubusercontent.com/Project-MONAI/model-zoo/dev/models/model_info.json"
SYSTEM_CONFIG = Path("/etc/radnode/config.yaml")


def find_config(explicit: Path | None = None) -> Path:
    """The configuration file: `explicit`, else $RADNODE_CONFIG, ./config.yaml, /etc/radnode/config.yaml.

    A file that was named and is not there is an error (`ConfigError`), never a reason to take another one.
    """
    named = [(explicit, "as named")] if explicit else []
    if not named and (from_environment := os.environ.get(ENVIRONMENT)):
        named = [(Path(from_environment), f"as ${ENVIRONMENT} names it")]
    for path, reason in named:
        if not path.is_file():
            raise ConfigError([Problem(path, 0, "", f"there is no such configuration file ({reason})")])
        return path
    places = (Path(CONFIG_NAME), SYSTEM_CONFIG)
    for path in places:
        if path.is_file():
            return path
    looked = f"${ENVIRONMENT} (not set), {', '.join(str(path.absolute()) for path in places)}"
    raise ConfigError([Problem(places[0], 0, "", f"no configuration found; looked at {looked}")])


def load_config(path: Path) -> Config:
    """The configuration in this file; raises `ConfigError` with every mistake, each with line and field."""
    file = path.absolute()
    return load_yaml(path, Config, ConfigError, check=_check_references, context={"file": file})


# -- The sections ------------------------------------------------------------------------------------------------------


class Node(Section):
    """This node: how peers know it, and where it keeps what it has received."""

    ae_title: AETitle = "RADNODE"
    host: Host = "0.0.0.0"  # the address to listen on
    port: Port = 11112
    storage: ResolvedPath


class Peer(Section):
    """A DICOM node that we know."""

    ae_title: AETitle
    host: Network  # a network (10.1.2.0/24) when it only sends to us
    port: Port | None = None  # None: it only sends to us
    # What it may do as a sender.
    maximum_associations: WholeNumber | None = Field(default=None, ge=1, le=1000)  # at once; None: as all together
    maximum_rate: Number | None = Field(default=None, gt=0)  # instances per second; a faster one is slowed down
    sop_classes: tuple[StorageClass, ...] | None = Field(default=None, min_length=1)  # UIDs; None: what the node takes
    # What it is asked as a source: how many instances its studies have (C-FIND), before they count as complete.
    query: bool = Field(default=False, strict=True)
    # What it gets as a destination.
    results: tuple[Kind, ...] | None = Field(default=None, min_length=1)  # None: whatever its routes make
    seg: Literal["auto", "binary", "labelmap", "fractional"] = "binary"  # auto: labelmap where it accepts that class
    compression: Literal["none", "lossless"] = "none"  # lossless: in the best lossless syntax that it accepts
    commitment: bool = Field(default=False, strict=True)  # it is asked to answer for what it got (PS3.4 J)


class Tls(Section):
    """A second door, for TLS with certificates on both sides (PS3.15 B.9); all files are PEM."""

    port: Port = 2762
    certificate: ResolvedPath
    key: ResolvedPath
    client_authority: ResolvedPath  # who signed the certificates of those who may come in


class Receive(Section):
    """Who may send, and how much at once."""

    from_: tuple[Name, ...] = Field(default=(), alias="from")  # names of peers; nobody else gets in
    maximum_associations: WholeNumber = Field(default=64, ge=1, le=1000)
    maximum_per_address: WholeNumber | None = Field(default=None, ge=1, le=1000)  # None: half of all, at least 8
    called_ae_check: bool = Field(default=True, strict=True)  # refuse associations that call another AE title than ours
    unknown_sop_classes: bool = Field(default=False, strict=True)  # take private and newer storage classes too
    maximum_object_bytes: Size = Field(default=16 * 10**9, alias="maximum_object")
    idle_s: Duration = Field(default=300.0, alias="idle")  # an association on which nothing happens ends
    durability: Literal["full", "relaxed"] = "full"  # relaxed: Success before the disk has the data
    tls: Tls | None = None
    watch: ResolvedPath | None = None  # files that appear in this folder are imported


class Complete(Section):
    """When a study counts as complete."""

    quiet_s: Duration = Field(default=30.0, alias="quiet")  # nothing arrived for so long
    # Nothing arrived for so long although the sender says that it has more.
    longest_s: Duration = Field(default=600.0, alias="longest")


class Models(Section):
    """Where model packages lie, and which digests an administrator trusts."""

    paths: Annotated[tuple[ResolvedPath, ...], BeforeValidator(one_or_list), Field(min_length=1)] = Field(alias="path")
    trusted: dict[Name, Digest] = Field(default_factory=dict)  # package name to its digest
    zoo: WebAddress = MODEL_ZOO  # the index that `radnode models add NAME` looks into


class PriorityRule(Section):
    """Studies of a route that are more, or less, urgent than its others."""

    when: When  # conditions on the route's series
    priority: Priority


class Route(Section):
    """A rule: which series go to which models, and whereto the results go."""

    name: str = Field(min_length=1, max_length=64)
    when: When  # `{}` takes every series
    run: tuple[Name, ...] = Field(min_length=1)  # names of model packages
    send_to: tuple[Name, ...] = ()  # names of peers
    results: tuple[Kind, ...] = Field(default=(Kind.SEG, Kind.SR), min_length=1)  # what is made
    tell_no_result: bool = Field(default=True, strict=True)  # whether the peers hear of a refusal or a failure
    priority: Priority = Priority.ROUTINE
    priority_when: tuple[PriorityRule, ...] = ()  # the first rule that fits one of its series decides
    deadline_s: Duration | None = Field(default=None, alias="deadline")  # from when it is queued; None: any time
    quiet_s: Duration | None = Field(default=None, alias="quiet")  # None: as complete.quiet; never longer
    start: Literal["study", "series"] = "study"  # series: on those that are quiet, while others still come


class Results(Section):
    """The site's own rules for result objects."""

    series_number: SeriesNumber = 901  # of the first kind; every kind has its place after it
    series_numbers: dict[Name, SeriesNumber] = Field(default_factory=dict)  # the same for single models
    series_description: Description = DESCRIPTION
    banner: Banner = BANNER  # on every picture
    language: Language = "en"  # of what people read on pictures
    withdraw_replaced: bool = Field(default=False, strict=True)  # a newer result withdraws the one that it replaces

    @property
    def house(self) -> House:
        """These rules as the makers of results take them."""
        return House(
            series_number=self.series_number,
            series_numbers=self.series_numbers,
            series_description=self.series_description,
            banner=self.banner,
            language=self.language,
        )


class Workers(Section):
    """The processes that run models."""

    engine: Literal["local", "ray"] = "local"
    count: WholeNumber = Field(default=1, ge=1, le=64)
    device: Device = "auto"
    # What the models of one worker may hold together, and one alone at its most; None: what is warm holds half of the
    # machine's memory at most, shared by the workers, and a running model what it wants.
    memory_bytes: Size | None = Field(default=None, alias="memory")
    # While a model runs, the next study's images are read into memory, where a quarter of what is free holds them.
    read_ahead: bool = True
    # With the engine ray a worker's models run in a slot on one of the cluster's machines.
    address: ClusterAddress = "auto"  # auto: the cluster that this machine belongs to
    gpus: Share | None = None  # of one slot; None: 1, and 0 with device cpu
    cpus: Number = Field(default=1.0, gt=0, le=1024)  # of one slot
    package_cache: AbsolutePath | None = None  # None: ~/.cache/radnode/packages
    package_cache_bytes: Size = Field(default=50 * 10**9, alias="package_cache_size")

    @property
    def slot_gpus(self) -> float:
        """The share of a GPU that a slot asks for."""
        if self.gpus is not None:
            return float(self.gpus)
        return 0.0 if self.device == "cpu" else 1.0


class Keep(Section):
    """How long studies stay, and how much of the disk stays free."""

    studies_s: Duration = Field(default=7 * 86400.0, alias="studies")
    free_disk: FreeDisk = FreeSpace(percent=10.0)


class Web(Section):
    """The HTTP port: STOW-RS and health."""

    listen: Listen = ("127.0.0.1", 8080)
    token_file: ResolvedPath | None = None  # its first line is the bearer token that a request must carry

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.listen[0] not in ("127.0.0.1", "::1", "localhost") and self.token_file is None:
            raise ValueError(f"listens on {self.listen[0]}, beyond this machine; expected token_file too")
        return self


class Config(Section):
    """The whole configuration; `load_config` makes it."""

    node: Node
    database: DatabaseURL = Field(default="sqlite", repr=False)
    peers: dict[Name, Peer] = Field(default_factory=dict)
    receive: Receive = Field(default_factory=Receive)
    complete: Complete = Field(default_factory=Complete)
    models: Models
    routes: tuple[Route, ...] = ()
    results: Results = Field(default_factory=Results)
    workers: Workers = Field(default_factory=Workers)
    keep: Keep = Field(default_factory=Keep)
    web: Web | None = None  # None: no HTTP port

    _path: Path = PrivateAttr(default=Path(CONFIG_NAME))

    def model_post_init(self, context: Any, /) -> None:
        file = context.get("file") if isinstance(context, Mapping) else None
        if isinstance(file, Path):
            self._path = file

    @property
    def path(self) -> Path:
        """The file that this was read from."""
        return self._path

    @property
    def database_url(self) -> str:
        """As SQLAlchemy wants it; may hold a password: never log it."""
        return f"sqlite:///{self.node.storage / 'radnode.sqlite'}" if self.database == "sqlite" else self.database


# -- Across fields -----------------------------------------------------------------------------------------------------


def _check_references(data: object) -> Iterator[tuple[Location, str]]:
    """What no single field can know: names that stand elsewhere in the file; the data may have any shape."""
    config = mapping_of(data)
    yield from _check_workers(mapping_of(config.get("workers")))
    peers = mapping_of(config.get("peers"))
    if "peers" in config and not isinstance(config["peers"], Mapping):
        return  # told already; every name would be unknown for this one reason
    yield from _check_peers(peers)
    receive = mapping_of(config.get("receive"))
    if receive.get("durability") == "relaxed" and config.get("database", "sqlite") != "sqlite":
        yield (
            ("receive", "durability"),
            "found 'relaxed' with a PostgreSQL database; expected 'full': relaxed is for one machine with SQLite, for "
            "of several none knows what another one lost",
        )
    for index, name in listing_of(receive.get("from")):
        yield from _check_peer_name(("receive", "from", index), name, peers)
    complete = mapping_of(config.get("complete"))
    quiet, longest = complete.get("quiet", "30s"), complete.get("longest")
    if _seconds_of(quiet) > _seconds_of(longest) > 0:
        yield (
            ("complete", "longest"),
            f"found {longest!r}, shorter than complete.quiet ({quiet}); expected as much or more: so long a study is "
            "waited for whose sender has more of it",
        )
    first_route: dict[str, int] = {}
    for number, route in listing_of(config.get("routes")):
        name = mapping_of(route).get("name")
        if isinstance(name, str) and first_route.setdefault(name, number) != number:
            yield (
                ("routes", number, "name"),
                f"found {name!r} as routes[{first_route[name]}] has it; expected another name",
            )
        own = mapping_of(route).get("quiet")
        if _seconds_of(own) > _seconds_of(quiet) > 0:
            yield (
                ("routes", number, "quiet"),
                f"found {own!r}, longer than complete.quiet ({quiet}), after which a study is complete for every "
                "route; expected less, or a longer complete.quiet",
            )
        for index, peer in listing_of(mapping_of(route).get("send_to")):
            location = ("routes", number, "send_to", index)
            yield from _check_peer_name(location, peer, peers)
            if mapping_of(peers.get(str(peer))) and mapping_of(peers[str(peer)]).get("port") is None:
                yield location, f"found {peer!r}, a peer without a port; expected peers.{peer}.port, to send there"


def _check_workers(workers: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """What only Ray understands, and what it does not."""
    if workers.get("engine") != "ray":
        for field in ("address", "gpus", "cpus", "package_cache", "package_cache_size"):
            if field in workers:
                yield ("workers", field), "is for slots in a Ray cluster; expected workers.engine: ray with it"
        return
    device, gpus = str(workers.get("device", "auto")), workers.get("gpus")
    if device.startswith("cuda:"):
        yield ("workers", "device"), f"found {device!r}; Ray chooses the GPU of a slot, expected auto, cpu or cuda"
    elif device == "cuda" and gpus == 0:
        yield ("workers", "gpus"), "found 0 with workers.device cuda; expected a share of a GPU, such as 0.5"
    elif device == "cpu" and isinstance(gpus, int | float) and gpus > 0:
        yield ("workers", "gpus"), f"found {gpus:g} with workers.device cpu; expected 0, or another device"


def _seconds_of(written: object) -> float:
    """A duration; 0.0 for what is none, which is told at its own field."""
    try:
        return parse_duration_s(written)
    except ValueError:
        return 0.0


def _check_peers(peers: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Two peers with one AE title and host could not be told apart when they call."""
    known: dict[tuple[str, str], str] = {}
    for name, peer in peers.items():
        title, host = mapping_of(peer).get("ae_title"), mapping_of(peer).get("host")
        if title is None or host is None:
            continue
        if "/" in str(host) and mapping_of(peer).get("port") is not None:
            yield ("peers", name, "host"), f"found {str(host)!r}, a network; expected one host, as {name} has a port"
        for field in ("query", "commitment"):
            if mapping_of(peer).get(field) is True and mapping_of(peer).get("port") is None:
                yield (
                    ("peers", name, field),
                    f"found true for a peer without a port; expected peers.{name}.port, to ask",
                )
        first = known.setdefault((str(title).strip(), str(host).strip().lower()), name)
        if first != name:
            yield ("peers", name), f"has the same ae_title and host as {first}; expected one peer of the two"


def _check_peer_name(location: Location, name: object, peers: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    if isinstance(name, str | int) and str(name) not in peers:
        known = f"one of {', '.join(peers)}" if peers else "a peer, and there are none under peers"
        yield location, f"found {str(name)!r}, which is not the name of a peer; expected {known}"
