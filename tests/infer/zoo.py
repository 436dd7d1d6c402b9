"""What bundles of the Model Zoo need to run without their weights: random ones, an oracle as the network, inputs."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from node.dicom.volume import Grid, Image, SliceRef, Volume
from node.infer.bundle import BundleModel
from node.infer.bundle_config import class_name, load_weights, parse_bundle, weights_path
from node.infer.inspection import components
from node.infer.manifest import Manifest, Task
from node.infer.presented import MemoryReader
from node.infer.shims import mended_libraries
from node.infer.sources import sources_of
from node.yamlfile import load_yaml

# Frames, rows, columns and whether in colour, of the planar inputs whose size their network fixes.
IMAGES = {
    "valve_landmarks": (3, 256, 256, False),
    "breast_density_classification": (1, 380, 300, False),
    "pathology_nuclei_segmentation_classification": (1, 256, 256, True),
    "pathology_nuclei_classification": (1, 128, 128, True),
    "pathology_nuclick_annotation": (1, 128, 128, True),
    "pathology_tumor_detection": (2, 224, 224, True),
    "classification_template": (1, 128, 128, False),
}


def read_manifest(folder: Path) -> Manifest:
    """The package's `dicom.yaml`."""
    return load_yaml(folder / "dicom.yaml", Manifest)


def write_random_weights(folder: Path, manifest: Manifest) -> None:
    """What the bundle's own configuration would load: its network's initial weights, and DiNTS' architecture file."""
    if _architectures(folder):
        _write_architecture(folder)
    modules: dict[str, Any] = {}
    with sources_of(folder, modules), mended_libraries():
        torch.manual_seed(0)
        parser = parse_bundle(folder, manifest, torch.device("cpu"), MemoryReader(manifest.inputs))
        loaders = [component for component in components(parser.get()) if class_name(component) == "CheckpointLoader"]
        for loader in loaders:
            path = weights_path(parser, loader)
            path.parent.mkdir(parents=True, exist_ok=True)
            network = parser.get_parsed_content("network" if "network" in parser.get() else "network_def")
            torch.save({next(iter(loader["load_dict"])): network.state_dict()}, path)
        load_weights(parser, folder, torch.device("cpu"))


def inputs_for(name: str, manifest: Manifest) -> dict[str, Volume | Image]:
    """A noisy synthetic input of a fitting kind and size for each of the manifest's."""
    noise = np.random.default_rng(4)
    inputs: dict[str, Volume | Image] = {}
    for key, wanted in manifest.inputs.items():
        if wanted.kind == "volume":
            array = noise.normal(0, 200, (48, 64, 72)).astype(np.float32)
            affine = np.diag([1.5, 1.5, 2.0, 1.0])
            slices = tuple(SliceRef("1.2", f"1.2.{index}") for index in range(48))
            inputs[key] = Volume(array, Grid(array.shape, affine, "1.2"), slices, "1.3", "1.4", "CT", "HU")
            continue
        frames, rows, columns, colour = IMAGES.get(name, (1, 256, 320, wanted.rgb))
        shape = (frames, rows, columns, 3) if colour and key != "label" else (frames, rows, columns)
        dtype = np.uint8 if len(shape) == 4 else np.float32
        planar = noise.integers(0, 256, shape).astype(dtype)
        references = tuple(SliceRef("1.2", "1.2.1", frame + 1) for frame in range(frames))
        inputs[key] = Image(planar, references, "1.3", "1.4", "OT")
    return inputs


# -- The oracle --------------------------------------------------------------------------------------------------------


class ThresholdNetwork(torch.nn.Module):
    """Logits that say 'class `label`' where the first channel is above half of the range that it is scaled to."""

    def __init__(self, channels: int, label: int, threshold: float, overlapping: bool):
        super().__init__()
        self.channels, self.label, self.threshold, self.overlapping = channels, label, threshold, overlapping

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        inside = image[:, :1] > self.threshold
        logits = torch.full((image.shape[0], self.channels, *image.shape[2:]), -8.0, device=image.device)
        if not self.overlapping:
            logits[:, :1] = torch.where(inside, -8.0, 8.0)
        logits[:, self.label : self.label + 1] = torch.where(inside, 8.0, -8.0)
        return logits


class BoxInferer:
    """In place of a detector: the box around what lies above the threshold, in voxels of the network's image."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def __call__(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> list[dict[str, torch.Tensor]]:
        found = []
        for image in inputs:
            where = torch.nonzero(torch.as_tensor(image)[0] > self.threshold)
            corners = torch.cat([where.min(0).values, where.max(0).values]).float()
            found.append(
                {"box": corners[None], "label": torch.zeros(1, dtype=torch.long), "label_scores": torch.ones(1) * 0.9}
            )
        return found


# Where the oracle cuts, in the intensities that the bundle's network sees, and the label that it says.
CUTS: dict[str, tuple[float, int]] = {"wholeBody_ct_segmentation": (0.0, 5), "brats_mri_segmentation": (0.0, 1)}
OVERLAPPING = {"brats_mri_segmentation", "renalStructures_CECT_segmentation"}  # channels by themselves, no background
COARSE = {
    "brats_mri_segmentation",
    "pediatric_abdominal_ct_segmentation",
    "spleen_deepedit_annotation",
    "prostate_mri_anatomy",
}  # voxels of
# another size than the object's: its edge moves by a part of one
AXES = {  # of the image that the network sees, where not RAS; "" is as it was acquired
    "renalStructures_CECT_segmentation": "LPS",
    "brats_mri_segmentation": "LPS",
    "ventricular_short_axis_3label": "",
    "segmentation_template": "",
}
PROMPTED = {"vista3d"}  # the network's own interface has more than one entrance


def check_with_oracle(folder: Path, manifest: Manifest) -> tuple[str, bool]:
    """Whether the object that was drawn in DICOM space comes back there, and stood where it belongs for the network."""
    from monai.engines.utils import IterationEvents

    from tests.infer.test_bundle import GEOMETRIES, dice, scan

    if manifest.task not in (Task.SEGMENTATION, Task.DETECTION) or any(
        wanted.kind == "image" for wanted in manifest.inputs.values()
    ):
        return "no oracle for this kind of result", True
    if folder.name in PROMPTED:
        return "no oracle for a network that takes prompts", True
    cut, label = CUTS.get(folder.name, (0.5, 1))
    overrides = dict(manifest.overrides)
    if manifest.task is Task.DETECTION:
        overrides["inferer"] = {"_target_": "tests.infer.zoo.BoxInferer", "threshold": cut}
    else:
        channels = _channels(folder, manifest)
        overrides["network_def"] = {
            "_target_": "tests.infer.zoo.ThresholdNetwork", "channels": channels, "label": label, "threshold": cut,
            "overlapping": folder.name in OVERLAPPING,
        }  # fmt: skip
        overrides["network"] = "@network_def"
    write_random_weights(folder, manifest.model_copy(update={"overrides": overrides}))
    model = BundleModel(folder, manifest.model_copy(update={"overrides": overrides}), "cpu")
    worst, said = 1.0, []
    for name in ("axial", "descending", "sagittal", "oblique", "anisotropic"):
        directions, spacing_mm = GEOMETRIES[name]
        volume, truth = scan(directions, spacing_mm)
        array = np.where(truth, 1000, -1000).astype(np.float32)
        volume = Volume(array, volume.grid, volume.slices, "1.3", "1.4", "CT", "HU")
        seen: list[tuple[str, NDArray[np.float64]]] = []
        model._evaluator.add_event_handler(
            IterationEvents.FORWARD_COMPLETED, _stands, next(iter(manifest.data_keys)), cut, seen
        )
        prediction = model.predict(dict.fromkeys(manifest.inputs, volume))
        axes, centre = seen[0]
        wanted = AXES.get(folder.name, "RAS")
        slices, rows, columns = np.nonzero(truth)
        off_mm = np.abs(centre - volume.grid.to_lps(np.stack([columns, rows, slices], axis=1)).mean(0)).max()
        if (wanted and axes != wanted) or off_mm > 2:
            return f"{name}: the network saw {axes}, and the object {off_mm:.1f} mm off its place", False
        if manifest.task is Task.DETECTION:
            score = _box_score(prediction.boxes[0], truth, volume)  # pyright: ignore
        else:
            found = prediction.array > 0  # pyright: ignore[reportAttributeAccessIssue]
            score = dice(found, truth)
        worst = min(worst, score)
        said.append(f"{name} {score:.3f}")
    return ", ".join(said), worst >= (0.9 if folder.name in COARSE else 0.99)


def _channels(folder: Path, manifest: Manifest) -> int:
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    return int(outputs.get("num_channels") or len(manifest.segments) + 1)


def _stands(engine: Any, key: str, cut: float, into: list[tuple[str, NDArray[np.float64]]]) -> None:
    """Notes the axes of the image that the network saw, and where the object's centre lay in it, in LPS millimetres."""
    image = engine.state.output["image"][0]
    where = torch.nonzero(torch.as_tensor(image)[0] > cut).double().mean(0).numpy()
    batch = engine.state.batch
    loaded = batch[0][key] if isinstance(batch, list) else batch[key][0]  # what CECT concatenates has none
    affine = np.asarray(loaded.affine, np.float64)
    centre = (affine[:3, :3] @ where + affine[:3, 3]) * [-1, -1, 1]
    into.append(("".join(nibabel.aff2axcodes(affine)), centre))


def _box_score(box: Any, truth: np.ndarray, volume: Volume) -> float:
    """1 where every face of the box lies within a voxel of the object's."""
    indices = np.stack(np.nonzero(truth)[::-1], axis=1)
    corners = volume.grid.to_lps(np.array(list(product(*zip(indices.min(0), indices.max(0), strict=True)))))
    off = max(np.abs(corners.min(0) - box.low_lps).max(), np.abs(corners.max(0) - box.high_lps).max())
    return 1.0 if off <= max(volume.grid.spacing_mm) * np.sqrt(3) else float(1 / off)


def _text(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "configs").glob("inference.*"))


def _architectures(folder: Path) -> list[str]:
    """The names of DiNTS' architecture files that the configuration loads."""
    return re.findall(r"(?m)^arch_ckpt_path.*?(search_code\w*\.pt)", _text(folder))


def _write_architecture(folder: Path) -> None:
    """A DiNTS architecture in which all 10 paths of its 12 blocks are open, as the search would store it."""
    (folder / "models").mkdir(exist_ok=True)
    paths = np.ones((12, 10), np.int64)
    for name in _architectures(folder):
        torch.save(
            {"arch_code_a": paths, "arch_code_c": paths, "node_a": np.ones((13, 4), bool)}, folder / "models" / name
        )
