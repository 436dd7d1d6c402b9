"""Architectures of the zoo with random weights, by the bundles' own last steps: bounded or not, one label map.

The bundles themselves are not here: `python -m tests.benchmark.zoo` runs all 25 of a checkout. What stands here are
facts of their configurations: the class of the network and its arguments, the sliding window, the order of the last
steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser

from node.dicom.volume import Volume
from node.errors import ModelError
from node.infer.bundle import BundleModel
from tests.infer.test_bundle import GEOMETRIES, configuration, manifest, scan

SOFTMAX, SIGMOID = ({"_target_": "Activationsd", "keys": "pred", name: True} for name in ("softmax", "sigmoid"))
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
THRESHOLD = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
MERGE = {
    "_target_": "Lambdad",
    "keys": "pred",
    "func": "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))",
}


def invert(*, nearest: bool) -> dict[str, Any]:
    return {
        "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
        "nearest_interp": nearest, "to_tensor": True,
    }  # fmt: skip


def loads(path: str) -> dict[str, Any]:
    return {
        "_target_": "CheckpointLoader",
        "load_path": f"$@bundle_root + '/{path}'",
        "load_dict": {"model": "@network"},
    }


def windows(size: int, **settings: Any) -> dict[str, Any]:
    return {
        "_target_": "SlidingWindowInferer",
        "roi_size": [size] * 3,
        "sw_batch_size": 2,
        "overlap": 0.25,
        **settings,
    }


# Name: the network, the inferer, the last steps, the number of labels.
BUNDLES: dict[str, tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], int]] = {
    "spleen_ct_segmentation": (
        {
            "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
            "channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "num_res_units": 2, "norm": "batch",
        },
        windows(32),
        [SOFTMAX, invert(nearest=False), ARGMAX],
        2,
    ),
    "wholeBody_ct_segmentation": (
        {
            "_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 105, "init_filters": 32,
            "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "dropout_prob": 0.2,
        },
        windows(32, mode="gaussian", padding_mode="replicate"),
        [SOFTMAX, ARGMAX, invert(nearest=True)],
        105,
    ),
    "swin_unetr_btcv_segmentation": (
        {
            "_target_": "SwinUNETR", "spatial_dims": 3, "img_size": 96, "in_channels": 1, "out_channels": 14,
            "feature_size": 48, "use_checkpoint": False,
        },
        windows(64, overlap=0),
        [SOFTMAX, invert(nearest=False), ARGMAX],
        14,
    ),
    "pediatric_abdominal_ct_segmentation": (
        {
            "_target_": "DynUNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 4,
            "kernel_size": [3] * 6, "strides": [1, 2, 2, 2, 2, [2, 2, 1]],
            "upsample_kernel_size": [2, 2, 2, 2, [2, 2, 1]], "norm_name": "instance", "res_block": True,
        },
        windows(64, overlap=0),
        [SOFTMAX, invert(nearest=False), ARGMAX],
        4,
    ),
    "brats_mri_segmentation": (
        {
            "_target_": "SegResNet", "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "init_filters": 16,
            "in_channels": 1, "out_channels": 3, "dropout_prob": 0.2,
        },
        windows(64),
        [SIGMOID, invert(nearest=False), THRESHOLD, MERGE],
        5,
    ),
    "ventricular_short_axis_3label": (
        {
            "_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 4,
            "channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "num_res_units": 2,
        },
        {"_target_": "SliceInferer", "roi_size": [64, 64], "spatial_dim": 2},
        [SOFTMAX, invert(nearest=False), ARGMAX],
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUNDLES)
def test_bounded_memory_gives_the_same_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    network, inferer, steps, labels = BUNDLES[name]
    config = configuration(resample=name != "brats_mri_segmentation")
    config |= {"network_def": network, "inferer": inferer, "imports": ["$import torch"]}
    config["postprocessing"]["transforms"] = [*steps, config["postprocessing"]["transforms"][-1]]
    config["handlers"].append(loads("models/model.pt"))
    folder = tmp_path / name
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0"}))
    (folder / "models").mkdir()
    torch.manual_seed(7)
    arguments = {key: value for key, value in network.items() if key != "img_size"}
    initial = ConfigParser(arguments).get_parsed_content()
    torch.save({"model": initial.state_dict()}, folder / "models" / "model.pt")
    meanings = {number: {"name": f"S{number}", "type": ["99TEST", "1", "Marker"]} for number in range(1, labels)}
    volume, _ = scan(*GEOMETRIES["oblique"], shape=(20, 34, 38))
    noise = np.random.default_rng(3).normal(0, 300, volume.array.shape).astype(np.float32)
    volume = Volume(volume.array + noise, volume.grid, volume.slices, "1.3", "1.4", "CT", "HU")
    monkeypatch.setattr("node.infer.bundle.check_labelmap", lambda array, grid, names: array.astype(np.uint16))
    bounded = BundleModel(folder, manifest(segments=meanings), "cpu")
    found = bounded.predict({"image": volume})
    monkeypatch.setattr("node.infer.bundle.bound_memory", lambda config, recipe=None: False)
    plain = BundleModel(folder, manifest(segments=meanings), "cpu")
    expected = plain.predict({"image": volume})
    steps_of = [{type(step).__name__ for step in model._pieces[1].transforms} for model in (bounded, plain)]
    assert any(step.startswith("Chunked") for step in steps_of[0])
    assert not any(step.startswith("Chunked") for step in steps_of[1])
    assert len(np.unique(expected.array)) > 1, "random weights say more than one thing"  # pyright: ignore
    assert np.array_equal(found.array, expected.array)  # pyright: ignore[reportAttributeAccessIssue]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    config = configuration()
    config["network_def"] = {"_target_": "BasicUNet", "spatial_dims": 3, "features": [4, 4, 8, 8, 16, 4]}
    config["handlers"].append(loads("model.pt"))
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0"}))
    torch.save({"model": torch.nn.Conv3d(1, 2, 1).state_dict()}, folder / "model.pt")
    with pytest.raises(ModelError, match=r"could not be loaded: RuntimeError: Error.s. in loading state_dict"):
        BundleModel(folder, manifest(), "cpu")
