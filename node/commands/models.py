"""`radnode models list|show|verify|pin|unpin`: the packages in the configured folders, and which are trusted."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from node.commands.output import clean, print_json, print_table
from node.commands.packages import config_at_hand, model_paths
from node.commands.pinning import CannotEdit, lines_for, write_pin
from node.config import Config, find_config, load_config
from node.errors import ModelError, NotFound, RadnodeError
from node.infer.inspection import Remark, inspect_package
from node.infer.manifest import Finding, Input
from node.infer.package import (
    Package,
    changes_since,
    check_trusted,
    discover_packages,
    find_package,
    hashes_file,
    keep_hashes,
    package_size,
)

_REMARKS_TOLD = 20


def list_models(options: Namespace) -> int:
    """Every package with its version, digest and whether it is pinned; 1 when one of them is wrong."""
    config = load_config(find_config(options.config))
    packages, errors = discover_packages(config.models.paths)
    rows = [
        {
            "model": package.name,
            "version": package.version,
            "title": package.manifest.title,
            "pinned": "yes" if package.name in config.models.trusted else "no",
            "digest": package.digest,
            "folder": str(package.folder),
        }
        for package in packages
    ]
    if options.json:
        print_json({"models": rows, "errors": [str(error) for error in errors]})
    else:
        print_table(rows, ["model", "version", "title", "pinned", "digest"], empty="no model packages")
        for error in errors:
            print(error)
    return 1 if errors else 0


def verify_models(options: Namespace) -> int:
    """Check the named packages, or all: manifest, bundle, pinned digest, and `--weights`; 1 when one is wrong."""
    config = load_config(find_config(options.config))
    packages, errors = discover_packages(config.models.paths)
    by_name = {package.name: package for package in packages}
    for name in options.names:
        if name not in by_name and not any(name in str(error) for error in errors):
            raise NotFound(f"no model package {name!r} in {', '.join(map(str, config.models.paths))}")
    chosen = [by_name[name] for name in options.names or by_name if name in by_name]
    failed = bool(errors) if not options.names else any(name not in by_name for name in options.names)
    verdicts = []
    for package in chosen:
        remarks = [*_judge_pin(package, config), *inspect_package(package, weights=options.weights)]
        failed = failed or any(remark.verdict == "wrong" for remark in remarks)
        verdicts.append((package, remarks))
    if options.json:
        print_json(
            {
                "models": [
                    {"model": package.name, "version": package.version, "digest": package.digest}
                    | {"remarks": [asdict(remark) for remark in remarks]}
                    for package, remarks in verdicts
                ],
                "errors": [str(error) for error in errors],
            }
        )
        return 1 if failed else 0
    for error in errors:
        print(error)
    for package, remarks in verdicts:
        bad = any(remark.verdict == "wrong" for remark in remarks)
        print(f"{package.name} {package.version}: {'wrong' if bad else 'good'}")
        print_remarks(remarks)
    return 1 if failed else 0


def show_model(options: Namespace) -> int:
    """One package as people read it: what it is for, what it takes, what it gives, and whether it is trusted."""
    package = find_package(options.name, model_paths(options.config))
    config = config_at_hand(options.config)
    manifest = package.manifest
    expected = config.models.trusted.get(package.name) if config else None
    pinned = "no" if expected is None else "yes" if expected == package.digest else f"another digest: {expected}"
    meanings = manifest.segments or manifest.classes
    facts: dict[str, Any] = {
        "model": package.name,
        "version": package.version,
        "title": manifest.title,
        "intended use": manifest.intended_use,
        "licence of the code": manifest.licence_code,
        "licence of the weights": manifest.licence_weights,
        "task": str(manifest.task),
        "folder": str(package.folder),
        "size": package_size(package.folder),
        "digest": package.digest,
        "pinned": pinned,
        "timeout": manifest.timeout_s,
    }
    if options.json:
        print_json(
            facts
            | {"inputs": {name: _describe_input(wanted) for name, wanted in manifest.inputs.items()}}
            | {"meanings": {value: _describe_meaning(finding) for value, finding in meanings.items()}}
            | {"measurements": [str(measurement) for measurement in manifest.measurements]}
        )
        return 0
    facts["size"] = f"{facts['size'] / 1e6:,.3f} MB"
    facts["timeout"] = f"{facts['timeout']:g} s"
    for name, value in facts.items():
        print(f"{name + ':':24}{clean(' '.join(str(value).split()))}")
    for name, wanted in manifest.inputs.items():
        print(f"\ninput {name}")
        for what, value in _describe_input(wanted).items():
            for index, line in enumerate(_lines_of(value)):
                print(f"  {'' if index else what + ':':22}{clean(line)}")
    print()
    rows = [{"value": value} | _describe_meaning(finding) for value, finding in meanings.items()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    print_table(rows, columns, empty="")
    if manifest.segments:
        print(f"\nmeasured of each: {', '.join(manifest.measurements)}")
    return 0


def pin_model(options: Namespace) -> int:
    """Pin the package as it lies there now."""
    config = load_config(find_config(options.config))
    package = find_package(options.name, config.models.paths)
    before = config.models.trusted.get(package.name)
    if before is not None and before != package.digest:
        changes = changes_since(package, before)
        print(f"{package.name} was pinned with another digest{': ' + ', '.join(changes) if changes else ''}")
    pin(package, config)
    return 0


def unpin_model(options: Namespace) -> int:
    """Take a pin away; the package itself is left as it is, and may be gone already."""
    config = load_config(find_config(options.config))
    if options.name not in config.models.trusted:
        raise NotFound(f"{options.name!r} is not pinned in {config.path}")
    try:
        write_pin(config.path, options.name, None)
    except CannotEdit as reason:
        print(f"{reason}; take {options.name} out of models.trusted by hand")
        return 0
    for path in config.models.paths:
        with suppress(OSError):
            hashes_file(path / options.name).unlink(missing_ok=True)
    print(f"{options.name} is no longer pinned in {config.path}; a running node knows from its next start on")
    return 0


def pin(package: Package, config: Config) -> None:
    """Write the package's digest into the configuration, or say which lines to add; and keep its files' hashes."""
    try:
        keep_hashes(package)
    except ModelError as error:
        print(f"note: {error}")
    if config.models.trusted.get(package.name) == package.digest:
        print(f"{package.name} is pinned in {config.path}: {package.digest}")
        return
    try:
        write_pin(config.path, package.name, package.digest)
    except CannotEdit as reason:
        print(f"{reason}. Not pinned yet: write these lines into your configuration\n")
        print(lines_for(package.name, package.digest))
        return
    print(f"pinned in {config.path}: {package.digest}")
    print("A running node knows the pin from its next start on.")


def print_remarks(remarks: Sequence[Remark]) -> None:
    """A line each, the worst first; of very many the first ones."""
    for remark in remarks[:_REMARKS_TOLD]:
        print(f"  {'' if remark.verdict == 'good' else remark.verdict + ': '}{clean(remark.says)}")
    if (more := len(remarks) - _REMARKS_TOLD) > 0:
        print(f"  and {more} more: radnode models verify --json")


def _judge_pin(package: Package, config: Config) -> Iterable[Remark]:
    try:
        check_trusted(package, config.models.trusted)
    except RadnodeError as error:
        return [Remark("wrong", str(error))]
    if package.name in config.models.trusted:
        return [Remark("good", "digest as pinned")]
    return [Remark("good", f"not pinned; models.trusted: {{{package.name}: {package.digest}}}")]


def _describe_input(wanted: Input) -> dict[str, Any]:
    """Its fields as they are written in `dicom.yaml`; what is at its default and means nothing is left out."""
    fields = wanted.model_dump(mode="python", exclude={"when", "limits", "rank"}, exclude_defaults=True)
    limits = wanted.limits.model_dump(exclude_none=True)
    return {
        "kind": wanted.kind,
        "takes": {keyword: wanted.when[keyword] for keyword in wanted.when},
        "prefers": [str(rank) for rank in wanted.rank],
        "limits": limits,
        **{name: value for name, value in fields.items() if name != "kind"},
    }


def _describe_meaning(finding: Finding) -> dict[str, str]:
    return {
        "name": finding.name,
        "type": _code(finding.type),
        "laterality": finding.laterality or "",
        "region": _code(finding.anatomic_region) if finding.anatomic_region else "",
        "category": _code(finding.category),
    }


def _code(code: tuple[str, str, str]) -> str:
    scheme, value, meaning = code
    return f"{meaning} ({scheme} {value})"


def _lines_of(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{name} {'absent' if part is None else part}" for name, part in value.items()] or ["anything"]
    if isinstance(value, list | tuple):
        return [", then ".join(map(str, value))]
    return [str(value)]
