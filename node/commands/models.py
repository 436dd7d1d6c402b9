"""`radnode models`: the packages in the configured folders."""

from __future__ import annotations

from argparse import Namespace

from node.commands.output import print_json, print_table
from node.config import find_config, load_config
from node.errors import NotFound, RadnodeError
from node.infer.package import check_trusted, discover_packages


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
    """Check the named packages (or all): manifest, configuration and pinned digest; 1 when one is not usable."""
    config = load_config(find_config(options.config))
    packages, errors = discover_packages(config.models.paths)
    by_name = {package.name: package for package in packages}
    for name in options.names:
        if name not in by_name and not any(name in str(error) for error in errors):
            raise NotFound(f"no model package {name!r} in {', '.join(map(str, config.models.paths))}")
    failed = bool(errors) and not options.names
    for error in errors:
        print(error)
    for name in options.names or by_name:
        if name not in by_name:
            failed = True
            continue
        try:
            check_trusted(by_name[name], config.models.trusted)
        except RadnodeError as error:
            print(error)
            failed = True
        else:
            pinned = (
                "digest as pinned"
                if name in config.models.trusted
                else f"not pinned; models.trusted: {{{name}: {by_name[name].digest}}}"
            )
            print(f"{name} {by_name[name].version}: good, {pinned}")
    return 1 if failed else 0
