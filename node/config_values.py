"""What a single value of the configuration may be: durations, sizes, names, addresses, and how each must be written.

Every error says what was found and what was expected.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from node.dicom.identity import is_uid
from node.report.house import House
from node.yamlfile import Number, WholeNumber

_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([smhd])", re.ASCII)
_SECONDS_PER = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%", re.ASCII)
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kMGT]i?B)", re.ASCII)
_BYTES_PER = {f"{prefix}{i}B": base**n for n, prefix in enumerate("kMGT", 1) for i, base in (("", 1000), ("i", 1024))}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|cuda(?::\d{1,3})?", re.ASCII)
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})", re.ASCII)


@dataclass(frozen=True)
class FreeSpace:
    """How much of a disk stays free: a share of it, or a size."""

    percent: float | None = None
    size_bytes: int | None = None

    def wanted_bytes(self, disk_bytes: int) -> int:
        """What must stay free on a disk of this size."""
        if self.size_bytes is not None:
            return self.size_bytes
        return math.ceil(disk_bytes * (self.percent or 0) / 100)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)


def parse_duration_s(value: object) -> float:
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match or float(match[1]) == 0:
        raise ValueError(
            f"found {_shown(value)}; expected a duration above zero with its unit, such as 30s, 10m, 2h or 7d"
        )
    return float(match[1]) * _SECONDS_PER[match[2]]


def _parse_free_space(value: object) -> FreeSpace:
    if isinstance(value, FreeSpace):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if (match := _PERCENT.fullmatch(text)) and float(match[1]) < 100:
        return FreeSpace(percent=float(match[1]))
    if match := _SIZE.fullmatch(text):
        return FreeSpace(size_bytes=int(float(match[1]) * _BYTES_PER[match[2]]))
    raise ValueError(
        f"found {_shown(value)}; expected a share of the disk below 100%, such as 10%, or a size, such as 20GB"
    )


def _parse_size_bytes(value: object) -> int:
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())) and float(match[1]) > 0:
        return int(float(match[1]) * _BYTES_PER[match[2]])
    raise ValueError(f"found {_shown(value)}; expected a size above zero with its unit, such as 500MB or 16GB")


def _parse_listen(value: object) -> tuple[str, int]:
    host, _, port = value.strip().rpartition(":") if isinstance(value, str) else ("", "", "")
    if port.isascii() and port.isdigit() and 1 <= int(port) <= 65535 and host:
        return _check_host(host.removeprefix("[").removesuffix("]")), int(port)
    raise ValueError(f"found {_shown(value)}; expected an address and a port, such as 127.0.0.1:8080")


def _check_ae_title(value: str) -> str:
    """PS3.5 6.2, VR AE: 1 to 16 characters of the default repertoire; leading and trailing spaces do not count."""
    title = value.strip(" ")
    if not 1 <= len(title) <= 16 or "\\" in title or not all(" " <= character <= "~" for character in title):
        raise ValueError(
            f"found {value!r}; expected an AE title: 1 to 16 ASCII characters, no backslash, not only spaces"
        )
    return title


def _check_host(value: str) -> str:
    host = value.strip()
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]{1,253}", host, re.ASCII):
        raise ValueError(f"found {value!r}; expected a host name or an IP address, without a port")
    return host


def _check_network(value: str) -> str:
    """A host, or the addresses of a network in CIDR notation."""
    if "/" not in value:
        return _check_host(value)
    try:
        return str(ip_network(value.strip(), strict=False))
    except ValueError:
        raise ValueError(f"found {value!r}; expected a host, or a network such as 10.1.2.0/24") from None


def _check_uid(value: str) -> str:
    if not is_uid(value.strip()):
        raise ValueError(f"found {value!r}; expected the UID of a storage SOP class, such as 1.2.840.10008.5.1.4.1.1.2")
    return value.strip()


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"found {value!r}; expected a name: 1 to 64 letters, digits, '_', '-' or '.', a letter or digit first"
        )
    return value


def _check_digest(value: str) -> str:
    if not (match := _DIGEST.fullmatch(value.strip())):
        raise ValueError(f"found {value[:80]!r}; expected a package's digest: the 64 hexadecimal digits of a SHA-256")
    return match[1].lower()


def _check_web_address(value: str) -> str:
    try:
        url = urlsplit(value.strip())
        good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"found {value[:80]!r}; expected an address that begins with https:// or http://")
    return value.strip()


def _check_description(value: str) -> str:
    """A pattern that gives an LO (PS3.5 6.2)."""
    try:
        House(series_description=value).describe(model="m", version="1", title="t", kind="seg")
    except (KeyError, ValueError, IndexError, AttributeError):
        raise ValueError(
            f"found {value!r}; expected text in which {{model}}, {{version}}, {{title}} and {{kind}} may stand"
        ) from None
    if not value.strip() or "\\" in value or not value.isprintable():
        raise ValueError(f"found {value!r}; expected text of printable characters without a backslash")
    return value


def _check_banner(value: str) -> str:
    """It is drawn as one line into every picture: nothing that cannot be seen may pass for it."""
    if len(value.strip()) < 4 or len(value) > 80 or not value.isprintable():
        raise ValueError(f"found {value[:80]!r}; expected one line of 4 to 80 printable characters, for every picture")
    return value.strip()


def _check_device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError(f"found {value!r}; expected auto, cpu, cuda, or cuda:N for one GPU of several")
    return value


def _check_cluster(value: str) -> str:
    """Where Ray's head listens; `ray://`, the way of its client, needs another package and holds no leases."""
    address = value.strip()
    if address == "auto":
        return address
    try:
        url = urlsplit(f"//{address}")
        good = bool(url.hostname) and url.port is not None and url.netloc == address and "@" not in address
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"found {value!r}; expected auto, or the address of Ray's head, such as 10.1.2.3:6379")
    return address


def _check_share(value: float) -> float:
    """Ray shares one accelerator among slots, or gives a slot a whole one; a model runs on one."""
    if not 0 <= value <= 1:
        raise ValueError(f"found {value:g}; expected the share of a GPU that one slot has: 0 (none) to 1, such as 0.5")
    return value


def _check_absolute(value: str) -> str:
    if not value.startswith("/") or "\0" in value:
        raise ValueError(f"found {value!r}; expected a path that begins with /, the same on every machine")
    return os.path.normpath(value)


def _check_database(value: str) -> str:
    """The value is never repeated: it may hold a password."""
    if value == "sqlite":
        return value
    try:
        url = urlsplit(value)
        good = url.scheme == "postgresql+psycopg" and len(url.path) > 1 and (url.port is None or url.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ValueError(
            "found another database than radnode knows; expected sqlite, or postgresql+psycopg://user:password@host/name"
        )
    return value


def _resolve(value: object, info: ValidationInfo) -> Path:
    """A path as written, relative to the folder of the configuration file."""
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise ValueError(f"found {_shown(value)}; expected a path")
    file = (info.context or {}).get("file")
    folder = file.parent if isinstance(file, Path) else Path.cwd()
    return Path(os.path.normpath(folder / Path(value).expanduser()))


Duration = Annotated[float, BeforeValidator(parse_duration_s)]  # seconds
AETitle = Annotated[str, AfterValidator(_check_ae_title)]
Host = Annotated[str, AfterValidator(_check_host)]
Network = Annotated[str, AfterValidator(_check_network)]
StorageClass = Annotated[str, AfterValidator(_check_uid)]
Port = Annotated[WholeNumber, Field(ge=1, le=65535)]
Name = Annotated[str, AfterValidator(_check_name)]
WebAddress = Annotated[str, AfterValidator(_check_web_address)]
SeriesNumber = Annotated[WholeNumber, Field(ge=1, le=999_000)]
Digest = Annotated[str, AfterValidator(_check_digest)]
ResolvedPath = Annotated[Path, BeforeValidator(_resolve)]
Size = Annotated[int, BeforeValidator(_parse_size_bytes)]  # bytes
FreeDisk = Annotated[FreeSpace, BeforeValidator(_parse_free_space)]
Listen = Annotated[tuple[str, int], BeforeValidator(_parse_listen)]  # address and port
Description = Annotated[str, AfterValidator(_check_description)]
Banner = Annotated[str, AfterValidator(_check_banner)]
Device = Annotated[str, AfterValidator(_check_device)]
ClusterAddress = Annotated[str, AfterValidator(_check_cluster)]
Share = Annotated[Number, AfterValidator(_check_share)]
AbsolutePath = Annotated[str, AfterValidator(_check_absolute)]
DatabaseURL = Annotated[str, AfterValidator(_check_database)]
