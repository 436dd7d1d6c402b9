"""The pinned digests in `config.yaml`: one entry of `models.trusted` written or removed, every other character kept.

The new text is read back before it takes the file's place: it must say what the old one said but for the pin.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from node.config import load_config
from node.errors import ConfigError, RadnodeError
from node.yamlfile import read_yaml


class CannotEdit(RadnodeError):
    """The configuration file is not writable or not of a shape that can be edited safely; it was left as it is."""


def lines_for(name: str, digest: str) -> str:
    """What an administrator adds by hand where `write_pin` cannot."""
    return f"models:\n  trusted:\n    {name}: {digest}\n"


def write_pin(file: Path, name: str, digest: str | None) -> None:
    """Set `models.trusted.NAME` in this configuration, or with None remove it; raises `CannotEdit`."""
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8")
        before = read_yaml(file, ConfigError).data
    except (OSError, UnicodeDecodeError, ConfigError):
        raise CannotEdit(f"{file} cannot be read") from None
    wanted: Any = copy.deepcopy(before)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        models = _value(root, "models")
        trusted = wanted["models"].get("trusted") or {}
        if digest is None:
            del trusted[name]
            edited = _without(text, models, name)
        else:
            trusted[name] = digest
            edited = _with(text, models, name, digest)
    except (_Unusual, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise CannotEdit(f"{file} writes models in an unusual way") from None
    wanted["models"].pop("trusted", None)
    if trusted:
        wanted["models"]["trusted"] = trusted
    _exchange(file.resolve(), raw, edited.encode(), wanted)


def _exchange(file: Path, before: bytes, after: bytes, wanted: object) -> None:
    """Replace the file in one step, with owner, mode and attributes kept, once its text proves to say what it must."""
    partly: Path | None = None
    try:
        if not os.access(file, os.W_OK):  # a file that is read-only is meant to be, even where its folder is not
            raise CannotEdit(f"{file} is not writable for this user")
        descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        partly = Path(partial)
        with open(descriptor, "wb") as opened:
            opened.write(after)
            opened.flush()
            os.fsync(opened.fileno())
        status = file.stat()
        shutil.copystat(file, partly)
        if (partly.stat().st_uid, partly.stat().st_gid) != (status.st_uid, status.st_gid):
            os.chown(partly, status.st_uid, status.st_gid)
        try:
            same = read_yaml(partly, ConfigError).data == wanted
            load_config(partly)
        except ConfigError:
            same = False
        if not same:
            raise CannotEdit(f"{file} writes models in an unusual way")
        if file.read_bytes() != before:
            raise CannotEdit(f"{file} was changed by someone else just now")
        partly.replace(file)
    except OSError as reason:
        raise CannotEdit(f"{file} cannot be written ({reason.strerror})") from None
    finally:
        if partly is not None:
            partly.unlink(missing_ok=True)


# -- The text ----------------------------------------------------------------------------------------------------------


class _Unusual(Exception):
    """A shape that is not worth the risk."""


def _with(text: str, models: yaml.MappingNode, name: str, digest: str) -> str:
    trusted = _find(models, "trusted")
    entry = f"{name}: {digest}"
    if trusted is None:
        if models.flow_style:
            return _insert_in_flow(text, models, f"trusted: {{{entry}}}")
        indent = " " * models.value[0][0].start_mark.column
        step = " " * max(models.value[0][0].start_mark.column, 2)
        return _insert_line(text, models, f"{indent}trusted:", f"{indent}{step}{entry}")
    _, value = trusted
    if isinstance(value, yaml.ScalarNode):  # `trusted:` with nothing, or null
        if value.style is not None or value.start_mark.index == value.end_mark.index:
            raise _Unusual
        return _cut(text, value.start_mark.index, value.end_mark.index, f"{{{entry}}}")
    if not isinstance(value, yaml.MappingNode):
        raise _Unusual
    if known := _find(value, name):
        if not isinstance(known[1], yaml.ScalarNode) or known[1].style in ("|", ">"):
            raise _Unusual
        return _cut(text, known[1].start_mark.index, known[1].end_mark.index, digest)
    if value.flow_style:
        return _insert_in_flow(text, value, entry)
    return _insert_line(text, value, f"{' ' * value.value[0][0].start_mark.column}{entry}")


def _without(text: str, models: yaml.MappingNode, name: str) -> str:
    trusted = _find(models, "trusted")
    if trusted is None or not isinstance(trusted[1], yaml.MappingNode):
        raise _Unusual
    holder, key = (models, "trusted") if len(trusted[1].value) == 1 else (trusted[1], name)
    found = _find(holder, key)
    if found is None or _find(trusted[1], name) is None:
        raise _Unusual
    index = holder.value.index(found)
    if not holder.flow_style:
        first = text.rfind("\n", 0, found[0].start_mark.index) + 1
        if text[first : found[0].start_mark.index].strip():
            raise _Unusual
        return _cut(text, first, _end_of_line(text, _end(found[1])), "")
    if index:
        return _cut(text, _end(holder.value[index - 1][1]), _end(found[1]), "")
    if len(holder.value) == 1:
        raise _Unusual
    return _cut(text, found[0].start_mark.index, holder.value[1][0].start_mark.index, "")


def _insert_in_flow(text: str, holder: yaml.MappingNode, entry: str) -> str:
    """After the last entry, or as the only one."""
    if holder.value:
        place = _end(holder.value[-1][1])
        return _cut(text, place, place, f", {entry}")
    place = holder.start_mark.index + 1
    return _cut(text, place, place, entry)


def _insert_line(text: str, holder: yaml.MappingNode, *lines: str) -> str:
    """Under the last line that an entry of the block stands in, its comment included."""
    newline = "\r\n" if "\r\n" in text else "\n"
    place = _end_of_line(text, _end(holder.value[-1][1]))
    before = "" if text[:place].endswith("\n") else newline
    return _cut(text, place, place, before + "".join(line + newline for line in lines))


def _cut(text: str, begin: int, end: int, instead: str) -> str:
    return text[:begin] + instead + text[end:]


def _end_of_line(text: str, place: int) -> int:
    found = text.find("\n", place)
    return len(text) if found < 0 else found + 1


def _end(node: yaml.Node) -> int:
    """Where the last character of a value stands; the end mark of a block also spans the comments that follow."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(node, yaml.MappingNode) else last
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        raise _Unusual
    return node.end_mark.index


def _find(holder: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next((pair for pair in holder.value if pair[0].value == name), None)


def _value(root: yaml.Node | None, name: str) -> yaml.MappingNode:
    found = _find(root, name) if isinstance(root, yaml.MappingNode) else None
    if found is None or not isinstance(found[1], yaml.MappingNode):
        raise _Unusual
    return found[1]
