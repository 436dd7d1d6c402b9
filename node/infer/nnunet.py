"""nnU-Net v2 trained folders, run from memory by nnU-Net's own predictor: its preprocessing, windows and resampling.

Two things are done here instead of there. The order and direction of axes, which nnU-Net leaves to the class that read
the training files, is made what that class gave. And the checkpoints are read as weights only: nnU-Net reads them, and
looks up the network's class, in ways that run whatever code a file asks for.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from node.dicom.volume import Grid, Image, Volume
from node.errors import InputRefused, ModelError
from node.infer.failures import explained
from node.infer.manifest import Manifest
from node.infer.packagings import NnUNet
from node.infer.reduce import quantise
from node.infer.results import Certainties, Labelmap, check_labelmap, keep_sparse

# The readers of nnU-Net for volumes, and the orientation that they make; None: that of the file.
_READERS = {
    "SimpleITKIO": None,
    "NibabelIO": None,
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
_NETWORKS = "dynamic_network_architectures."
_LAYERS = "torch.nn."
_JSON_MAX = 50_000_000  # bytes


class NnUNetModel:
    """One trained configuration with one or more folds, run as often as wanted, by one thread at a time."""

    def __init__(self, folder: Path, manifest: Manifest, device: str):
        """Load the network; `ModelError` says what is missing or does not fit `dicom.yaml`."""
        self._name, self._manifest = folder.name, manifest
        self._settings = manifest.nnunet or NnUNet()
        with explained(self._name, "be loaded"), _quiet():
            self._predictor, self._orientation = self._load(folder / self._settings.folder, torch.device(device))

    def predict(self, inputs: Mapping[str, Volume | Image]) -> Labelmap:
        """Run on `inputs`, which are the channels in the manifest's order; the labels lie on the first one's grid.

        Raises `InputRefused` for inputs on different grids, `ModelError` when nnU-Net fails, `OutputRefused` when what
        it returned is no label map.
        """
        if self._predictor is None:
            raise ModelError(f"model {self._name} was closed")
        names = list(self._manifest.inputs)
        volumes = [volume for name in names if isinstance(volume := inputs[name], Volume)]
        if len(volumes) != len(names):
            raise InputRefused("nnU-Net takes volumes here, not planar images")
        grid = volumes[0].grid
        for other in volumes[1:]:
            if other.grid.shape != grid.shape or not np.allclose(other.grid.affine_lps, grid.affine_lps, atol=1e-3):
                raise InputRefused("the inputs lie on different grids: set onto_first for all but the first of them")
        there, back = _turns(grid, self._orientation)
        with explained(self._name, "run"), _quiet():
            channels = [apply_orientation(volume.array.transpose(2, 1, 0), there) for volume in volumes]
            array = np.stack([channel.transpose(2, 1, 0) for channel in channels]).astype(np.float32)
            spacing = np.empty(3)  # of the turned axes
            spacing[there[:, 0].astype(int)] = grid.spacing_mm[::-1]
            properties = {"spacing": [float(length) for length in spacing[::-1]]}
            labels, found = self._run(array, properties)

            def turned(values: Any) -> NDArray[Any]:
                return apply_orientation(np.asarray(values).transpose(2, 1, 0), back).transpose(2, 1, 0)

            labels = turned(labels)
        checked = check_labelmap(labels, grid, self._manifest.label_names)
        if found is None:
            return Labelmap(checked, grid, names[0])
        certain = {label: keep_sparse(turned(values)) for label, values in found.items()}
        return Labelmap(checked, grid, names[0], probabilities=certain)

    def close(self) -> None:
        """Let go of the network and its memory."""
        self._predictor = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, array: NDArray[np.float32], properties: dict[str, Any]) -> tuple[Any, Certainties | None]:
        """nnU-Net's labels, and their probabilities where they are wanted, as (slices, rows, columns) of `array`."""
        predictor: Any = self._predictor
        if not self._manifest.probabilities:
            return predictor.predict_single_npy_array(array, properties, None, None, False), None
        from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        # What `predict_single_npy_array` does: its own probabilities are all classes in float32, twice.
        nothing: Any = [None]  # no earlier stage, no file
        adapter = PreprocessAdapterFromNpy(
            [array], nothing, [properties], nothing, predictor.plans_manager, predictor.dataset_json,
            predictor.configuration_manager, num_threads_in_multithreaded=1, verbose=False,
        )  # fmt: skip
        item: Any = next(adapter)
        logits = predictor.predict_logits_from_preprocessed_data(item["data"]).cpu()
        listening: Any = _Listening(predictor.label_manager, list(self._manifest.segments))
        about = item["data_properties"]
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, predictor.plans_manager, predictor.configuration_manager, listening, about
        )
        back = predictor.plans_manager.transpose_backward
        inside = tuple(slice(*ends) for ends in about["bbox_used_for_cropping"])
        found: Certainties = {}
        for label, values in listening.found.items():
            whole = np.zeros(about["shape_before_cropping"], np.uint8)
            whole[inside] = values
            found[label] = whole.transpose(back)
        return labels, found

    def _load(self, folder: Path, device: torch.device) -> tuple[Any, str]:
        """nnU-Net's predictor, and the orientation of the images that it wants."""
        try:
            from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
            from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
            from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
            from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
        except ImportError as reason:
            raise ModelError(
                f"model {self._name} needs nnU-Net ({reason.name} is missing): pip install 'radnode[nnunet]'"
            ) from None
        settings = self._settings
        plans, dataset = (_read_json(self._name, folder / file) for file in ("plans.json", "dataset.json"))
        checkpoints = [
            _read_checkpoint(self._name, folder / f"fold_{fold}" / settings.checkpoint) for fold in settings.folds
        ]
        first = checkpoints[0]
        manager = PlansManager(plans)
        configuration = manager.get_configuration(first["init_args"]["configuration"])
        if configuration.previous_stage_name is not None:
            raise ModelError(f"model {self._name} is the second stage of a cascade, which does not run by itself")
        _check_architecture(self._name, configuration)
        channels = determine_num_input_channels(manager, configuration, dataset)
        if channels != len(self._manifest.inputs):
            names = ", ".join(str(name) for name in dataset.get("channel_names", {}).values())
            declared = len(self._manifest.inputs)
            raise ModelError(f"model {self._name} takes {channels} inputs ({names}); dicom.yaml declares {declared}")
        trainer = recursive_find_trainer_class_by_name(first["trainer_name"])
        heads = manager.get_label_manager(dataset).num_segmentation_heads
        network = trainer.build_network_architecture(
            manager, configuration, channels, heads, enable_deep_supervision=False
        )
        weights = [checkpoint["network_weights"] for checkpoint in checkpoints]
        for parameters in weights:
            network.load_state_dict(parameters)
        predictor = nnUNetPredictor(
            tile_step_size=settings.step,
            use_mirroring=settings.mirroring,
            perform_everything_on_device=device.type == "cuda",
            device=device,
            allow_tqdm=False,
        )
        network = network.to(device).eval()
        axes = first.get("inference_allowed_mirroring_axes")
        trainer_name = first["trainer_name"]
        if self._manifest.probabilities and manager.get_label_manager(dataset).has_regions:
            raise ModelError(
                f"model {self._name} was trained on regions, whose probabilities are not those of its labels: set "
                "probabilities to false"
            )
        predictor.manual_initialization(network, manager, configuration, weights, dataset, trainer_name, axes)
        return predictor, self._check_orientation(str(plans.get("image_reader_writer")))

    def _check_orientation(self, reader: str) -> str:
        """The orientation in which the network saw its training images."""
        if reader not in _READERS:
            raise ModelError(f"model {self._name} was trained on files that {reader} read, which are no volumes")
        made, said = _READERS[reader], self._settings.orientation
        if made is None and said is None:
            raise ModelError(
                f"model {self._name}: plans.json names the reader {reader}, which keeps the order of axes of files; "
                "say as nnunet.orientation which one the training files had (LPS as axial DICOM, RAS, LAS, ...)"
            )
        if made is not None and said not in (None, made):
            raise ModelError(
                f"model {self._name}: the reader {reader} makes every image {made}; remove nnunet.orientation"
            )
        orientation = made or said
        assert orientation is not None  # one of the two was said
        return orientation


class _Listening:
    """nnU-Net's label manager, which is shown all logits on the image's grid, and keeps their softmax as it decides."""

    def __init__(self, manager: Any, labels: list[int]):
        self._manager, self._labels = manager, labels
        self.found: Certainties = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def convert_logits_to_segmentation(self, logits: Any) -> Any:
        """As the manager's own."""
        values = torch.as_tensor(logits)
        self.found = {label: np.empty(values.shape[1:], np.uint8) for label in self._labels if label < values.shape[0]}
        for index in range(values.shape[1]):
            plane = quantise(torch.softmax(values[:, index].float(), dim=0))
            for label, kept in self.found.items():
                kept[index] = plane[label].numpy()
        return self._manager.convert_logits_to_segmentation(logits)


def _turns(grid: Grid, orientation: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How (column, row, slice) axes become those of `orientation`, and the way back."""
    own, wanted = io_orientation(grid.affine_ras), axcodes2ornt(tuple(orientation))
    return ornt_transform(own, wanted), ornt_transform(wanted, own)


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_JSON_MAX))
    except OSError as reason:
        raise ModelError(f"model {name}: {path.name} cannot be read ({reason.strerror})") from None
    except (ValueError, RecursionError):
        raise ModelError(f"model {name}: {path.name} is not JSON") from None
    if not isinstance(content, dict):
        raise ModelError(f"model {name}: {path.name} holds no mapping")
    return content


def _read_checkpoint(name: str, path: Path) -> dict[str, Any]:
    """A checkpoint as nnU-Net's trainer writes it: tensors and plain values, and numpy's numbers in its log."""
    try:
        with torch.serialization.safe_globals(_numpy_values()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # pickle and zip errors of many kinds
        first_line = (str(reason).splitlines() or [""])[0][:200]
        raise ModelError(
            f"model {name}: {path.parent.name}/{path.name} cannot be read as weights: {first_line}"
        ) from None
    wanted = ("network_weights", "trainer_name", "init_args")
    missing = [key for key in wanted if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ModelError(f"model {name}: {path.parent.name}/{path.name} has no {', '.join(missing)}")
    return checkpoint


def _numpy_values() -> list[Any]:
    """What numpy's numbers and arrays are pickled as, under their names of numpy 1 and 2; none of it runs code."""
    from numpy._core import multiarray

    allowed: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{module}.scalar"), (multiarray._reconstruct, f"{module}._reconstruct")]
    return allowed


def _check_architecture(name: str, configuration: Any) -> None:
    """Refuse plans that name anything but a network of nnU-Net's own library, built of torch's layers."""
    arguments = configuration.network_arch_init_kwargs
    layers = [arguments.get(key) for key in configuration.network_arch_init_kwargs_req_import]
    named = [(configuration.network_arch_class_name, _NETWORKS), *((layer, _LAYERS) for layer in layers if layer)]
    for found, start in named:
        if not str(found).startswith(start) or "__" in str(found):
            raise ModelError(f"model {name}: plans.json builds its network of {str(found)[:80]}; expected {start}...")


@contextmanager
def _quiet() -> Iterator[None]:
    """nnU-Net prints as it goes."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines()[:50]:
            logging.getLogger(__name__).debug("nnU-Net: %s", line)
