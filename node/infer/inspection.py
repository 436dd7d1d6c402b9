"""A package looked through without running any of it: does what `dicom.yaml` says fit the bundle?

The bundle's configuration is read as plain data. A reference or an expression is followed where it only puts a path
together; everything else in it stays unknown, and what stays unknown is said, never guessed.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from node.errors import ModelError
from node.infer.manifest import Manifest, Task
from node.infer.package import INFERENCE, METADATA, Package
from node.infer.packagings import Adapter
from node.infer.poststeps import probability_recipe
from node.infer.weights import count_weights

REQUIRED = ("network_def", "inferer", "evaluator", "dataset", "preprocessing")
_CONFIG_MAX = 10_000_000  # bytes
_DEPTH_MAX = 20  # references that lead to references
_WEIGHTS = (".pt", ".pth", ".safetensors", ".ts", ".onnx")
_LICENCES = {"Apache License": "apache", "MIT License": "mit", "Permission is hereby granted, free": "mit"}


@dataclass(frozen=True)
class Remark:
    """One thing that was found; a package with a `wrong` one cannot run as it is."""

    verdict: Literal["good", "warning", "wrong"]
    says: str


def inspect_package(package: Package, *, weights: bool = False) -> list[Remark]:
    """What is wrong or doubtful about a package, the worst first; `weights` also reads the checkpoints."""
    try:
        looked = _inspect_bundle(package, read=weights) if _is_bundle(package) else _look_for_program(package)
        remarks = [*looked, *_compare_licences(package)]
    except ModelError as error:
        return [Remark("wrong", str(error))]
    order = ("wrong", "warning", "good")
    return sorted(remarks, key=lambda remark: order.index(remark.verdict))


def _is_bundle(package: Package) -> bool:
    return package.manifest.adapter is Adapter.MONAI_BUNDLE


def _inspect_bundle(package: Package, *, read: bool) -> Iterator[Remark]:
    config, metadata = _read(package.folder, *INFERENCE), _read(package.folder, METADATA)
    yield from _look_for_ids(config)
    yield from _apply_overrides(config, package.manifest.overrides, metadata)
    yield from _look_for_weights(package, config, read=read)
    yield from _compare_labels(package.manifest, metadata)
    if package.manifest.probabilities:
        yield _look_for_probabilities(config)


def _look_for_probabilities(config: dict[str, Any]) -> Remark:
    try:
        probability_recipe(config)
    except ModelError as reason:
        return Remark("wrong", str(reason))
    return Remark("good", "its post-processing says what makes probabilities of the network's output")


def _look_for_program(package: Package) -> Iterator[Remark]:
    """Whether a packaging that runs a program has one; the files of the others `load_package` has looked for."""
    command = package.manifest.command
    if command is None or not command.run:
        return
    program = command.run[0].replace("{package}", str(package.folder.absolute()))
    if shutil.which(program) is None:
        yield Remark("wrong", f"there is no program {program} that may be run")
    else:
        yield Remark("good", f"it runs {program}")


def _read(folder: Path, *places: str) -> dict[str, Any]:
    file = next(folder / place for place in places if (folder / place).is_file())
    try:
        with file.open("rb") as opened:
            text = opened.read(_CONFIG_MAX)
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as reason:
        raise ModelError(f"{file.name} cannot be read ({reason.strerror})") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise ModelError(f"{file.name} is not valid {'JSON' if file.suffix == '.json' else 'YAML'}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file.name} holds no mapping of ids to what they stand for")
    return data


# -- Ids ---------------------------------------------------------------------------------------------------------------


def _apply_overrides(
    config: dict[str, Any], overrides: Mapping[str, Any], metadata: dict[str, Any]
) -> Iterator[Remark]:
    """Set each override in `config`, and say which of them meet nothing."""
    for identifier, value in overrides.items():
        *path, last = identifier.replace("::", "#").split("#")
        holder: Any = {**config, "_meta_": metadata}
        if not path:
            if last not in config and last not in REQUIRED:
                yield Remark(
                    "warning", f"overrides.{identifier}: the bundle has no id {last!r}, so this changes nothing"
                )
            config[last] = copy.deepcopy(value)
            continue
        try:
            for step in path:
                holder = holder[int(step)] if isinstance(holder, list) else holder[step]
            if isinstance(holder, list):
                holder[int(last)] = copy.deepcopy(value)
                continue
            if not isinstance(holder, dict):
                raise KeyError(last)
        except (KeyError, IndexError, ValueError, TypeError):
            yield Remark("wrong", f"overrides.{identifier}: the bundle has no {'#'.join(path)!r} to set {last!r} in")
            continue
        if last not in holder and "_target_" not in holder:  # a component takes arguments that were not written
            yield Remark("warning", f"overrides.{identifier}: {'#'.join(path)!r} has no {last!r}")
        holder[last] = copy.deepcopy(value)


def _look_for_ids(config: dict[str, Any]) -> Iterator[Remark]:
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        yield Remark("wrong", f"the bundle's inference configuration has no {', '.join(missing)}")


# -- Weights -----------------------------------------------------------------------------------------------------------


def _look_for_weights(package: Package, config: dict[str, Any], *, read: bool) -> Iterator[Remark]:
    folder = package.folder
    paths: list[Path] = []
    for component in components(config):
        if str(component["_target_"]).rpartition(".")[2] != "CheckpointLoader":
            continue
        try:
            path = Path(folder, str(_Resolver(config, folder).value(component.get("load_path"))))
            safe = path.with_suffix(".safetensors")  # comes first when it is there
            paths.append(safe if safe.is_file() else path)
        except _Unknown:
            yield Remark(
                "warning", f"which weights are loaded is not clear before it runs: {component.get('load_path')}"
            )
    present = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file())
    without = package.manifest.licence_weights.strip().lower().startswith("none")
    if not paths and not present and not without:
        yield Remark("warning", "there are no weights, and licence_weights does not say none")
    if present and without:
        yield Remark("warning", f"licence_weights says none, and there is {present[0].relative_to(folder)}")
    for path in dict.fromkeys(paths):
        shown = path.relative_to(folder) if path.is_relative_to(folder) else path
        if not path.is_file():
            yield Remark("wrong", f"the weights {shown} are missing")
        elif not path.resolve().is_relative_to(folder.resolve()):
            yield Remark(
                "wrong", f"the weights {shown} lie outside of the package, where the digest does not cover them"
            )
        elif read:
            try:
                tensors, values = count_weights(path)
            except ModelError as error:
                yield Remark("wrong", f"{shown}: {error}")
            else:
                yield Remark("good", f"{shown}: {tensors:,} tensors with {values:,} values, read as weights only")


def components(node: Any) -> Iterator[dict[str, Any]]:
    """Every part of a configuration that names a class."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from components(value)
    elif isinstance(node, list):
        for value in node:
            yield from components(value)


class _Unknown(Exception):
    """What only running the bundle would tell."""


class _Resolver:
    """Values that are put together from constants, references and paths, and nothing else."""

    _REFERENCE = re.compile(r"@(\w+(?:(?:#|::)\w+)*)")

    def __init__(self, config: dict[str, Any], folder: Path):
        self._config = config
        self._folder = folder

    def value(self, written: Any, depth: int = 0) -> Any:
        """What a configuration's entry stands for; raises `_Unknown`."""
        if depth > _DEPTH_MAX:
            raise _Unknown
        if not isinstance(written, str):
            return written
        text = written.strip()
        if match := self._REFERENCE.fullmatch(text):
            return self._entry(match[1], depth)
        if not text.startswith("$"):
            if "%" in text:  # another file's entry
                raise _Unknown
            return text
        names: dict[str, str] = {}

        def name_for(match: re.Match[str]) -> str:
            return names.setdefault(match[1], f"_reference_{len(names)}")

        try:
            tree = ast.parse(self._REFERENCE.sub(name_for, text[1:]).strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError):
            raise _Unknown from None
        return self._evaluate(tree.body, {name: identifier for identifier, name in names.items()}, depth)

    def _entry(self, identifier: str, depth: int) -> Any:
        if identifier == "bundle_root":
            return str(self._folder)
        node: Any = self._config
        try:
            for step in identifier.replace("::", "#").split("#"):
                node = node[int(step)] if isinstance(node, list) else node[step]
        except (KeyError, IndexError, ValueError, TypeError):
            raise _Unknown from None
        return self.value(node, depth + 1)

    def _evaluate(self, node: ast.expr, names: Mapping[str, str], depth: int) -> Any:
        match node:
            case ast.Constant(value=str() | bool() | int() as constant):
                return constant
            case ast.Name(id=name) if name in names:
                return self._entry(names[name], depth)
            case ast.BinOp(left=left, op=ast.Add() | ast.Div() as operator, right=right):
                first, second = self._evaluate(left, names, depth), self._evaluate(right, names, depth)
                if not isinstance(first, str) or not isinstance(second, str):
                    raise _Unknown
                return first + second if isinstance(operator, ast.Add) else str(Path(first, second))
            case ast.IfExp(test=test, body=body, orelse=other):
                chosen = self._evaluate(test, names, depth)
                if not isinstance(chosen, bool):
                    raise _Unknown
                return self._evaluate(body if chosen else other, names, depth)
            case ast.Call(func=function, args=arguments, keywords=[]) if ast.unparse(function) in (
                "str", "Path", "pathlib.Path", "os.path.join",
            ):  # fmt: skip
                return str(Path(*(str(self._evaluate(argument, names, depth)) for argument in arguments)))
        raise _Unknown


# -- Labels and licences -----------------------------------------------------------------------------------------------


def _compare_labels(manifest: Manifest, metadata: dict[str, Any]) -> Iterator[Remark]:
    """The manifest's values against the channels that the bundle's makers give a meaning."""
    theirs = _channels(metadata, manifest.output)
    if theirs is None:
        return
    theirs = {value: name for value, name in theirs.items() if value not in manifest.background}
    ours = {value: finding.name for value, finding in (manifest.segments or manifest.classes).items()}
    if manifest.task is Task.SEGMENTATION:
        background = theirs.pop(0, None)
        if background is None or "background" not in background.lower():
            if theirs or background is not None:
                yield Remark(
                    "warning",
                    f"the bundle's first channel is {background!r}, not background: its channels are no label values, "
                    "so segments could not be compared with them",
                )
            return
    elif manifest.task is not Task.CLASSIFICATION:
        return
    what = "segments" if manifest.segments else "classes"
    for value in sorted(theirs.keys() - ours.keys()):
        yield Remark("warning", f"{what} lacks {value}, which is {theirs[value]!r} in the bundle")
    for value in sorted(ours.keys() - theirs.keys()):
        yield Remark("warning", f"{what}.{value} ({ours[value]}) is no channel of the bundle")
    for value in sorted(ours.keys() & theirs.keys()):
        finding = (manifest.segments or manifest.classes)[value]
        side = finding.laterality if finding.laterality in ("left", "right") else ""
        if not _agree(f"{ours[value]} {side}", theirs[value]):
            yield Remark("warning", f"{what}.{value} is {ours[value]!r} here and {theirs[value]!r} in the bundle")


def _channels(metadata: dict[str, Any], output: str) -> dict[int, str] | None:
    """Number to meaning of each channel of the bundle's output; None where it does not say, or has but one."""
    node: Any = metadata
    for step in ("network_data_format", "outputs", output, "channel_def"):
        node = node.get(step) if isinstance(node, dict) else None
    if not isinstance(node, dict) or len(node) < 2:
        return None
    return {int(number): str(meaning) for number, meaning in node.items() if str(number).isdecimal()}


def _agree(ours: str, theirs: str) -> bool:
    """Whether two names can mean one thing: a word in common, and not left here and right there."""
    first, second = (set(re.findall(r"[a-z]{2,}|\d+", name.lower())) for name in (ours, theirs))
    for side, other in (("left", "right"), ("right", "left")):
        if side in first and side not in second and other in second:
            return False
    if all(len(word) <= 3 for word in second):  # IVC, LV: an abbreviation can mean anything
        return True
    first, second = first - {"left", "right"}, second - {"left", "right"}
    stems = {word[:4] for word in first} & {word[:4] for word in second}
    return bool(stems) or any(difflib.get_close_matches(word, second, n=1, cutoff=0.75) for word in first)


def _compare_licences(package: Package) -> Iterator[Remark]:
    manifest = package.manifest
    for field in ("licence_code", "licence_weights"):
        value = getattr(manifest, field).strip()
        if value.lower() in ("?", "unknown", "todo", "tbd", "n/a", "-"):
            yield Remark("warning", f"{field} is {value!r}: find out before the model is used")
    file = next(
        (package.folder / name for name in ("LICENSE", "LICENSE.txt") if (package.folder / name).is_file()), None
    )
    if file is None:
        yield Remark("warning", "the package has no LICENSE file")
        return
    with file.open("rb") as opened:
        text = opened.read(4096).decode(errors="replace")
    for words, licence in _LICENCES.items():
        if words in text and licence not in manifest.licence_code.lower():
            yield Remark("warning", f"licence_code is {manifest.licence_code!r}, and {file.name} holds the {words!r}")
            return
