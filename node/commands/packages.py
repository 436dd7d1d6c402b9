"""Where the commands look for model packages."""

from __future__ import annotations

import sys
from pathlib import Path

import node
from node.config import find_config, load_config
from node.errors import ConfigError


def model_paths(config: Path | None) -> tuple[Path, ...]:
    """The configured model folders; with no configuration at hand ./models and the ones that came with radnode."""
    if config is None:
        try:
            config = find_config()
        except ConfigError:
            return (Path("models"), *shipped_models())
    return (*load_config(config).models.paths, *shipped_models())


def shipped_models() -> tuple[Path, ...]:
    """The reference models that came with radnode: in a checkout beside the package, installed below share/radnode."""
    places = (Path(node.__file__).parent.parent / "models", Path(sys.prefix) / "share" / "radnode" / "models")
    return tuple(place for place in places if place.is_dir())
