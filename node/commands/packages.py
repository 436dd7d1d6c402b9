"""Where the commands look for model packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import node
from node.config import ENVIRONMENT, Config, find_config, load_config
from node.errors import ConfigError


def model_paths(config: Path | None) -> tuple[Path, ...]:
    """The configured model folders; with no configuration at hand ./models and the ones that came with radnode."""
    found = config_at_hand(config)
    return (*(found.models.paths if found else (Path("models"),)), *shipped_models())


def config_at_hand(named: Path | None) -> Config | None:
    """The configuration; None where none was named, by option or environment, and none is in the usual places."""
    try:
        path = find_config(named)
    except ConfigError:
        if named is not None or os.environ.get(ENVIRONMENT):
            raise
        return None
    return load_config(path)


def shipped_models() -> tuple[Path, ...]:
    """The reference models that came with radnode: in a checkout beside the package, installed below share/radnode."""
    places = (Path(node.__file__).parent.parent / "models", Path(sys.prefix) / "share" / "radnode" / "models")
    return tuple(place for place in places if place.is_dir())
