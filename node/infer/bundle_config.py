"""A bundle's inference configuration, parsed and turned from files to memory. Nothing of the bundle's own is edited.

Four things are exchanged: what loads reads from memory, what saves is off, the dataset holds the one item, and weights
are loaded as weights only. Everything else stays as its makers wrote it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.bundle.config_parser import ConfigParser

from node.errors import ModelError
from node.infer.inspection import REQUIRED, components
from node.infer.manifest import Manifest
from node.infer.presented import MemoryReader
from node.infer.shims import mend_component, mend_expression

CONFIGS = ("inference.json", "inference.yaml", "inference.yml")

_LOADS = ("LoadImage", "LoadImaged", "LoadImageD", "LoadImageDict")
_SAVES = ("Save", "Saver", "Writer")


def parse_bundle(folder: Path, manifest: Manifest, device: torch.device, memory: MemoryReader) -> ConfigParser:
    """The configuration of the bundle in `folder`, ready to give its evaluator; `ModelError` says what is missing."""
    files = [folder / "configs" / name for name in CONFIGS if (folder / "configs" / name).is_file()]
    if not files:
        raise ModelError(f"bundle {folder.name} has no configs/inference.json or inference.yaml")
    parser = ConfigParser()
    parser.read_config(str(files[0]))
    parser.read_meta(str(folder / "configs" / "metadata.json"))
    config: dict[str, Any] = parser.get()
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise ModelError(f"{files[0].name} of bundle {folder.name} has no {', '.join(missing)}")
    _mend_expressions(config, device)
    config["bundle_root"] = str(folder)
    config["device"] = device
    loads = [component for component in components(config) if class_name(component) in _LOADS]
    for component in components(config):
        _exchange(component, memory)
        mend_component(component)
    bare = any(class_name(component) == "LoadImage" for component in loads)
    config["dataset"] = {
        "_target_": "monai.data.Dataset",
        "data": _Item(manifest, memory, bare=bare, loaded=not loads),
        "transform": config["dataset"].get("transform", "@preprocessing"),
    }
    config["dataloader"] = {
        "_target_": "monai.data.DataLoader",
        "dataset": "@dataset",
        "batch_size": 1,
        "shuffle": False,
        "num_workers": 0,
    } | {key: value for key, value in config.get("dataloader", {}).items() if key == "collate_fn"}
    config["evaluator"] |= {
        "val_data_loader": "@dataloader",
        "val_handlers": None,
        "key_val_metric": None,
        "additional_metrics": None,
    }
    for identifier, value in manifest.overrides.items():
        parser[identifier] = value
    return parser


def load_weights(parser: ConfigParser, folder: Path, device: torch.device) -> None:
    """What the bundle's own CheckpointLoader would load, as weights only: a checkpoint cannot run code.

    A file of the same name that ends in `.safetensors` comes first.
    """
    for component in list(components(parser.get())):
        if class_name(component) != "CheckpointLoader":
            continue
        component["_disabled_"] = True
        path = weights_path(parser, component)
        safe = path.with_suffix(".safetensors")
        if safe.is_file():
            from safetensors.torch import load_file

            state = load_file(safe, device=str(device))
        elif path.is_file():
            state = torch.load(path, map_location=device, weights_only=True)
        else:
            raise ModelError(f"the weights of bundle {folder.name} are missing: {path}")
        key = next(iter(component.get("load_dict", {"model": ""})))
        network = parser.get_parsed_content("network" if "network" in parser.get() else "network_def")
        network.load_state_dict(state.get(key, state))
        _check_finite(network, folder)


def _check_finite(network: torch.nn.Module, folder: Path) -> None:
    """Refuse weights that are no numbers: a threshold on what comes of them is false everywhere, which would be told as
    a study without findings.
    """
    for name, values in network.state_dict().items():
        if torch.is_tensor(values) and values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ModelError(
                f"the weights of bundle {folder.name} have values in {name} that are not finite (NaN or infinity): "
                "install the bundle anew"
            )


def weights_path(parser: ConfigParser, loader: dict[str, Any]) -> Path:
    """Where a CheckpointLoader of the configuration finds its file."""
    parser["radnode_weights"] = loader["load_path"]
    return Path(parser.get_parsed_content("radnode_weights"))


def output_transform(parser: ConfigParser) -> Any | None:
    """What a saving handler would have done to the output before it wrote it (the boxes of a detector); else None.

    The handler itself is off; its `output_transform` is the bundle's post-processing all the same.
    """
    handlers = parser.get().get("handlers")
    for index, handler in enumerate(handlers if isinstance(handlers, list) else ()):
        name = class_name(handler) if isinstance(handler, dict) and "_target_" in handler else ""
        if is_saver(name) and name != "ClassificationSaver" and "output_transform" in handler:
            return parser.get_parsed_content(f"handlers#{index}#output_transform")
    return None


def class_name(component: dict[str, Any]) -> str:
    """The last part of what a component's `_target_` names."""
    return str(component["_target_"]).rpartition(".")[2]


def is_saver(name: str) -> bool:
    """Whether a class writes files, by its name."""
    return name.startswith(_SAVES) or name.rstrip("dD").endswith(_SAVES)


class _Item:
    """The dataset's one item, made anew for each run: names that `MemoryReader` knows, or for a bundle that loads
    nothing the tensors themselves.
    """

    def __init__(self, manifest: Manifest, memory: MemoryReader, *, bare: bool, loaded: bool):
        self._manifest, self._memory = manifest, memory
        self._bare, self._loaded = bare, loaded

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        sources: dict[str, Any] = {}
        for key, names in self._manifest.data_keys.items():
            if self._loaded and isinstance(names, str):
                sources[key] = self._memory.tensor(names)
            else:
                sources[key] = names if isinstance(names, str) else list(names)
        return next(iter(sources.values())) if self._bare else sources | dict(self._manifest.item)


def _exchange(component: dict[str, Any], memory: MemoryReader) -> None:
    name = class_name(component)
    if name in _LOADS:
        component["reader"] = memory
        component.pop("converter", None)
        component.pop("affine_lps_to_ras", None)
        if name != "LoadImage":
            component["allow_missing_keys"] = True  # a label that only training has
    elif is_saver(name):
        component["_disabled_"] = True


def _mend_expressions(node: Any, device: torch.device) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, str):
            node[key] = mend_expression(value, device)
        elif isinstance(value, dict | list):
            _mend_expressions(value, device)
