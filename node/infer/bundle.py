"""MONAI Bundles as published, run from memory: our volume replaces their dataset, their prediction no file.

The bundle's own evaluator runs (not a copy of what it does), so whatever its makers configured between loader and
post-processing happens. Three things are exchanged in the parsed configuration: what loads reads from memory, what
saves is off, and the dataset holds the one item. torch and monai are imported here and nowhere else in `node`.
"""

from __future__ import annotations

import logging
import pydoc
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data.image_reader import ImageReader
from monai.data.meta_tensor import MetaTensor
from monai.engines.utils import IterationEvents
from monai.transforms.spatial.array import SpatialResample
from numpy.typing import NDArray

from node.dicom.volume import Image, Volume
from node.errors import ModelError, OutputRefused, RadnodeError
from node.infer.manifest import Manifest
from node.infer.results import Labelmap, check_labelmap

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_LOADS = ("LoadImage", "LoadImaged", "LoadImageD", "LoadImageDict")
_SAVES = ("Save", "Saver", "Writer")
_REQUIRED = ("network_def", "inferer", "evaluator", "dataset", "preprocessing")


class BundleModel:
    """One bundle, loaded once and run as often as wanted, by one thread at a time."""

    def __init__(self, folder: Path, manifest: Manifest, device: str):
        """Load the bundle and its weights; `ModelError` says what is missing or raised."""
        self._folder = folder.absolute()
        self._manifest = manifest
        self._device = torch.device(device)
        self._memory = _MemoryReader()
        self._modules: dict[str, ModuleType] = {}
        self._evaluator: Any = self._load()

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap:
        """Run on `inputs` (one volume per input of the manifest); the label map lies on the first input's grid.

        Raises `ModelError` when the bundle raises, `OutputRefused` when what it returns is no label map of that grid.
        """
        reference_name = next(iter(self._manifest.inputs))
        reference = inputs[reference_name]
        if not isinstance(reference, Volume):
            raise ModelError(f"model {self._folder.name} takes volumes, not planar images")
        if self._evaluator is None:
            self._evaluator = self._load()
        self._memory.volumes = dict(inputs)
        done = False
        try:
            sources = _sources_of(self._folder, self._modules)
            with _explained(self._folder, "run"), sources, torch.inference_mode():
                self._evaluator.run()
                output = self._evaluator.state.output
                item = output[0] if isinstance(output, Sequence) else output
                if self._manifest.output not in item:
                    raise ModelError(
                        f"model {self._folder.name} returned no {self._manifest.output!r} (there are "
                        f"{', '.join(sorted(map(str, item)))}): see output in dicom.yaml"
                    )
                prediction = item[self._manifest.output]
                array = _to_source_grid(prediction, item.get(reference_name), reference)
                done = True
        finally:
            self._memory.volumes = {}
            self._evaluator.state.output = None  # the next study must not wait with this one's memory
            self._evaluator.state.batch = None
            if not done:  # an ignite engine that raised never runs again: the next study loads the bundle afresh
                self._evaluator = None
        checked = check_labelmap(array, reference.grid, self._manifest.label_names)
        return Labelmap(checked, reference.grid, reference_name)

    def close(self) -> None:
        """Let go of the network and of the bundle's own modules."""
        self._evaluator = None
        self._modules.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> Any:
        """The bundle's evaluator, with its weights."""
        with _explained(self._folder, "be loaded"), _sources_of(self._folder, self._modules):
            parser = self._parse()
            self._load_weights(parser)
            evaluator = parser.get_parsed_content("evaluator", instantiate=True)
            evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, _check_extent)
            return evaluator

    def _parse(self) -> ConfigParser:
        files = [self._folder / "configs" / name for name in _CONFIGS if (self._folder / "configs" / name).is_file()]
        if not files:
            raise ModelError(f"bundle {self._folder.name} has no configs/inference.json or inference.yaml")
        parser = ConfigParser()
        parser.read_config(str(files[0]))
        parser.read_meta(str(self._folder / "configs" / "metadata.json"))
        config: dict[str, Any] = parser.get()
        missing = [name for name in _REQUIRED if name not in config]
        if missing:
            raise ModelError(f"{files[0].name} of bundle {self._folder.name} has no {', '.join(missing)}")
        config["bundle_root"] = str(self._folder)
        config["device"] = self._device
        for component in _components(config):
            self._exchange(component)
        config["dataset"] = {
            "_target_": "monai.data.Dataset",
            "data": [{name: name for name in self._manifest.inputs}],
            "transform": config["dataset"].get("transform", "@preprocessing"),
        }
        config["dataloader"] = {
            "_target_": "monai.data.DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        }
        config["evaluator"] |= {
            "val_data_loader": "@dataloader",
            "val_handlers": None,
            "key_val_metric": None,
            "additional_metrics": None,
        }
        for identifier, value in self._manifest.overrides.items():
            parser[identifier] = value
        return parser

    def _exchange(self, component: dict[str, Any]) -> None:
        name = str(component["_target_"]).rpartition(".")[2]
        if name in _LOADS:
            component["reader"] = self._memory
            component.pop("converter", None)
            component.pop("affine_lps_to_ras", None)
            if name != "LoadImage":
                component["allow_missing_keys"] = True  # a label that only training has
        elif name.startswith(_SAVES) or name.rstrip("dD").endswith(_SAVES):
            component["_disabled_"] = True

    def _load_weights(self, parser: ConfigParser) -> None:
        """What the bundle's own CheckpointLoader would load, as weights only: a checkpoint cannot run code."""
        for component in list(_components(parser.get())):
            if str(component["_target_"]).rpartition(".")[2] != "CheckpointLoader":
                continue
            component["_disabled_"] = True
            parser["radnode_weights"] = component["load_path"]
            path = Path(parser.get_parsed_content("radnode_weights"))
            if not path.is_file():
                raise ModelError(f"the weights of bundle {self._folder.name} are missing: {path}")
            state = torch.load(path, map_location=self._device, weights_only=True)
            key = next(iter(component.get("load_dict", {"model": ""})))
            network = parser.get_parsed_content("network" if "network" in parser.get() else "network_def")
            network.load_state_dict(state.get(key, state))


class _MemoryReader(ImageReader):
    """MONAI's image reader for volumes that lie in memory: a name in place of a path, and never a file."""

    def __init__(self) -> None:
        self.volumes: dict[str, Volume | Image] = {}

    def verify_suffix(self, filename: Any) -> bool:
        return True

    def read(self, data: Any, **kwargs: Any) -> list[Volume]:
        names = [data] if isinstance(data, str) else list(data)
        return [self.volumes[str(name)] for name in names]  # pyright: ignore[reportReturnType]

    def get_data(self, img: list[Volume]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """(x, y, z), or with several volumes on one grid (channel, x, y, z), with the affine in RAS as MONAI has it."""
        first = img[0]
        for other in img[1:]:
            if other.grid.shape != first.grid.shape or not np.allclose(other.grid.affine_lps, first.grid.affine_lps):
                raise ModelError("the inputs that the bundle reads as channels lie on different grids")
        arrays = [volume.array.transpose(2, 1, 0) for volume in img]
        affine = first.grid.affine_ras
        metadata = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(arrays[0].shape),
            "space": "RAS",
            "original_channel_dim": float("nan") if len(arrays) == 1 else 0,
        }
        return (arrays[0] if len(arrays) == 1 else np.stack(arrays)), metadata


def _components(node: Any) -> Iterator[dict[str, Any]]:
    """Every part of a configuration that names a class."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _components(value)
    elif isinstance(node, list):
        for value in node:
            yield from _components(value)


def _check_extent(evaluator: Any) -> None:
    """Refuse what the network itself returned when it does not cover the image that it saw, voxel by voxel.

    A tensor that was cut or strided keeps the affine of its image, and an inversion would put it in the wrong place.
    """
    output = evaluator.state.output
    prediction, image = output.get("pred"), output.get("image")
    if not isinstance(prediction, torch.Tensor) or not isinstance(image, torch.Tensor):
        return
    if prediction.ndim != image.ndim or prediction.shape[2:] != image.shape[2:]:
        raise OutputRefused(
            f"the model returned a map of shape {tuple(prediction.shape)} for an image of shape {tuple(image.shape)}"
        )


def _to_source_grid(prediction: Any, seen: Any, reference: Volume) -> NDArray[np.number]:
    """A prediction (channels, x, y, z) as (slices, rows, columns) on the reference's grid.

    Several channels are one-hot. A prediction without geometry lies where the image lay that the network saw (`seen`):
    MONAI's Invertd passes such a one by. `OutputRefused` where its size fits neither that image nor the reference.
    """
    tensor = prediction if isinstance(prediction, torch.Tensor) else torch.as_tensor(np.asarray(prediction))
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.shape[0] > 1:
        tensor = tensor.argmax(dim=0, keepdim=True)
    wanted = tuple(reversed(reference.grid.shape))
    if tuple(tensor.shape[1:]) not in (wanted, tuple(getattr(seen, "shape", ()))[1:]):
        raise OutputRefused(
            f"the model returned a map of shape {tuple(tensor.shape[1:])}, the input's grid is {wanted} (x, y, z)"
        )
    if not isinstance(tensor, MetaTensor) and isinstance(seen, MetaTensor) and seen.shape[1:] == tensor.shape[1:]:
        tensor = MetaTensor(tensor, affine=seen.affine)
    if isinstance(tensor, MetaTensor):
        same = np.allclose(np.asarray(tensor.affine), reference.grid.affine_ras, atol=1e-3)
        if tuple(tensor.shape[1:]) != wanted or not same:
            resample = SpatialResample(mode="nearest", padding_mode="zeros")
            tensor = resample(tensor, dst_affine=torch.as_tensor(reference.grid.affine_ras), spatial_size=wanted)
    array = tensor.detach().cpu().numpy() if not isinstance(tensor, MetaTensor) else tensor.as_tensor().cpu().numpy()
    return np.ascontiguousarray(array[0].transpose(2, 1, 0))


@contextmanager
def _sources_of(folder: Path, modules: dict[str, ModuleType]) -> Iterator[None]:
    """The bundle's root on the module path, as `monai.bundle run` has it, without compiled files.

    All bundles call their package `scripts`, so what a bundle imports is kept in `modules` while another one runs.
    The digest of a package leaves `__pycache__` out, so nothing in one may be run.
    """
    names = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    others = _take_modules(names)
    sys.modules.update(modules)
    before = sys.pycache_prefix
    sys.path.insert(0, str(folder))
    with tempfile.TemporaryDirectory(prefix="radnode-") as cache:
        sys.pycache_prefix = cache
        try:
            yield
        finally:
            sys.pycache_prefix = before
            sys.path.remove(str(folder))
            modules.clear()
            modules.update(_take_modules(names))
            sys.modules.update(others)


def _take_modules(names: set[str]) -> dict[str, ModuleType]:
    """The imported modules and packages of these names and all that is in them, which are then no longer imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}


@contextmanager
def _explained(folder: Path, doing: str) -> Iterator[None]:
    """Whatever a bundle raises, as a `ModelError` that says what, why (by its innermost cause) and in which part."""
    name = folder.name
    try:
        yield
    except RadnodeError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(f"model {name} could not {doing}: the GPU is out of memory") from error
    except MemoryError as error:
        raise ModelError(f"model {name} could not {doing}: out of memory") from error
    except (Exception, SystemExit) as error:  # a bundle may raise anything, and must not end the node's process
        causes = _causes_of(error)
        logging.getLogger(__name__).debug("model %s could not %s", name, doing, exc_info=error)
        part = _part_of(causes, folder)
        first_line = (str(causes[-1]).splitlines() or [""])[0][:300]
        where = f" (in {part})" if part else ""
        raise ModelError(f"model {name} could not {doing}: {type(causes[-1]).__name__}: {first_line}{where}") from error


def _causes_of(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on. What was being handled by the way explains nothing."""
    causes = [error]
    while True:
        # MONAI imports by pydoc, whose error holds the module's own.
        deeper = causes[-1].value if isinstance(causes[-1], pydoc.ErrorDuringImport) else causes[-1].__cause__
        if deeper is None:
            return causes
        causes.append(deeper)


def _part_of(causes: Sequence[BaseException], folder: Path) -> str:
    """Which part of the bundle raised: its own source, or the class that its configuration names; "" when unknown."""
    innermost = causes[-1]
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(innermost.__traceback__)]
    if isinstance(innermost, SyntaxError) and innermost.filename:
        places.append((Path(innermost.filename), innermost.lineno))
    for file, line in reversed(places):
        if file.is_relative_to(folder):
            return f"{file.relative_to(folder).as_posix()}, line {line}"
    for cause in reversed(causes):  # MONAI's own words, with the class or the object's repr
        if found := re.match(r"applying transform <(\S+) object|Failed to instantiate component '(\S+)'", str(cause)):
            return (found[1] or found[2]).rpartition(".")[2]
    return ""
