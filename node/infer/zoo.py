"""The MONAI Model Zoo: which bundles there are, where they lie, and the large files that a bundle only names."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from node.errors import FetchError
from node.infer.fetch import Checksum, fetch_text, shown

_ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)_v(\d+(?:\.\d+)*)", re.ASCII)
_LARGE_FILES = ("large_files.yml", "large_files.yaml", "large_files.json")
_LIST_MAX = 1_000_000  # bytes


@dataclass(frozen=True)
class ZooBundle:
    """One version of a bundle of the zoo."""

    name: str
    version: str
    url: str
    checksum: Checksum  # the zoo's are SHA-1


@dataclass(frozen=True)
class LargeFile:
    """A file that a bundle names in place of holding it: mostly its weights."""

    path: PurePosixPath  # in the bundle
    url: str
    checksum: Checksum | None


def find_bundle(wanted: str, index_url: str, fetch: Callable[[str], str] = fetch_text) -> ZooBundle:
    """`NAME`, the newest version, or `NAME@VERSION`, of the index at `index_url`; raises `FetchError`."""
    name, _, version = wanted.partition("@")
    versions: dict[str, dict[str, Any]] = {}
    for key, entry in _read_index(index_url, fetch).items():
        if (match := _ENTRY.fullmatch(key)) and isinstance(entry, dict):
            versions.setdefault(match[1], {})[match[2]] = entry
    if name not in versions:
        near = difflib.get_close_matches(name, versions, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(versions)) or 'none'}"
        raise FetchError(f"there is no bundle {name!r} in the model zoo {shown(index_url)}: {hint}")
    known = sorted(versions[name], key=_ordered)
    version = version.removeprefix("v") or known[-1]
    if version not in versions[name]:
        raise FetchError(f"the model zoo has no version {version!r} of {name}; it has {', '.join(known)}")
    entry = versions[name][version]
    url, checksum = entry.get("source"), entry.get("checksum")
    if not isinstance(url, str) or not isinstance(checksum, str):
        raise FetchError(f"the model zoo {shown(index_url)} gives no source or no checksum for {name} {version}")
    return ZooBundle(name, version, url, Checksum.of(checksum))


def read_large_files(folder: Path) -> list[LargeFile]:
    """What the bundle's `large_files.yml` names; empty without one. Raises `FetchError` when it makes no sense."""
    file = next((folder / name for name in _LARGE_FILES if (folder / name).is_file()), None)
    if file is None:
        return []
    try:
        with file.open("rb") as opened:
            listed = yaml.safe_load(opened.read(_LIST_MAX))  # JSON is YAML
    except (OSError, yaml.YAMLError, RecursionError):
        raise FetchError(f"{file.name} of bundle {folder.name} cannot be read as YAML") from None
    items = listed.get("large_files") if isinstance(listed, dict) else None
    if not isinstance(items, list):
        raise FetchError(f"{file.name} of bundle {folder.name} has no list large_files")
    return list(_read_items(items, f"{file.name} of bundle {folder.name}"))


def _read_items(items: list[Any], where: str) -> Iterator[LargeFile]:
    for item in items:
        path, url = (item.get("path"), item.get("url")) if isinstance(item, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(url, str):
            raise FetchError(f"{where} has an item without path or url")
        parts = path.split("/")
        if not path.isprintable() or "\\" in path or any(part in ("", ".", "..") for part in parts):
            raise FetchError(f"{where} has the path {path[:200]!r}, which leads out of the bundle")
        digest = item.get("hash_val") or ""
        checksum = Checksum.of(str(digest)) if digest else None
        yield LargeFile(PurePosixPath(path), _direct(url), checksum)


def _direct(url: str) -> str:
    """The address of the file itself where `url` is that of Google Drive's page about it, as ten of the zoo's are."""
    parts = urlsplit(url)
    if parts.hostname not in ("drive.google.com", "docs.google.com"):
        return url
    found = re.match(r"/file/d/([\w-]+)", parts.path)
    identifier = found[1] if found else next(iter(parse_qs(parts.query).get("id", [])), "")
    if not identifier:
        return url
    return f"https://drive.usercontent.google.com/download?id={identifier}&export=download&confirm=t"


def _read_index(url: str, fetch: Callable[[str], str]) -> dict[str, Any]:
    try:
        index = json.loads(fetch(url))
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise FetchError(f"{shown(url)} is not the index of a model zoo; see models.zoo")
    return index


def _ordered(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
