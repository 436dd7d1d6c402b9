"""MONAI Bundles from memory: a network that thresholds, run as a bundle on volumes of every geometry.

The truth is analytic: a marker without any symmetry is given in LPS millimetres, and each volume samples it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import py_compile
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from node.dicom.volume import Grid, Volume
from node.errors import ModelError, OutputRefused
from node.infer.bundle import BundleModel
from node.infer.manifest import Manifest
from node.infer.results import check_labelmap
from tests.infer.phantoms import AXIAL, GEOMETRIES, dice, scan

# -- The bundle --------------------------------------------------------------------------------------------------------

NETWORK = """\
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        return (image > 500).to(torch.float32)
"""
PLAIN = NETWORK.replace("(image > 500)", "(image.as_tensor() > 500)")
ONE_HOT = NETWORK.replace(
    "(image > 500).to(torch.float32)", "torch.cat([(image <= 500), (image > 500)], dim=1).to(torch.float32)"
)
RESAMPLE = [{"_target_": "Spacingd", "keys": "image", "pixdim": [2.0, 2.0, 2.0], "mode": "bilinear"}]
INVERT = [
    {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": True,
        "to_tensor": True,
    }
]


def configuration(
    *, resample: bool = False, orient: bool = True, invert: bool = True, pre: list | None = None, **parts: Any
) -> dict[str, Any]:
    """A bundle as the zoo's are written: files in, files out."""
    orientation = [{"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None}]
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "eval",
        "data": "$[{'image': path} for path in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))]",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {"_target_": "scripts.net.Threshold"},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                *(orientation if orient else []),
                *(RESAMPLE if resample else []),
                *(pre or []),
                {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 2},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                *(INVERT if invert else []),
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "handlers": [
            {"_target_": "StatsHandler", "iteration_log": False},
            {"_target_": "MetricsSaver", "save_dir": "@output_dir"},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
        **parts,
    }


def manifest(**parts: Any) -> Manifest:
    return Manifest.model_validate(
        {
            "title": "Marker",
            "intended_use": "Tests.",
            "licence_code": "Apache-2.0",
            "licence_weights": "none",
            "inputs": {"image": {}},
            "segments": {1: {"name": "Marker", "type": ["99TEST", "1", "Marker"]}},
            **parts,
        }
    )


Build = Callable[..., BundleModel]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Writes a bundle into `tmp_path/models/NAME` and loads it; the working directory is the empty `tmp_path/cwd`."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def load_bundle(
        config: dict[str, Any] | None = None,
        *,
        name: str = "marker",
        network: str = NETWORK,
        files: dict[str, str] | None = None,
        **parts: Any,
    ) -> BundleModel:
        folder = tmp_path / "models" / name
        contents = {
            "configs/inference.json": json.dumps(config or configuration()),
            "configs/metadata.json": json.dumps({"version": "0.1.0"}),
            "scripts/__init__.py": "",
            "scripts/net.py": network,
            **(files or {}),
        }
        for path, text in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        return BundleModel(folder, manifest(**parts), "cpu")

    return load_bundle


# -- Geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [NETWORK, PLAIN, ONE_HOT], ids=["MetaTensor", "plain tensor", "one-hot"])
@pytest.mark.parametrize("resample", [False, True], ids=["as is", "resampled"])
def test_mask_comes_back_on_the_sources_grid(load: Build, resample: bool, network: str) -> None:
    model = load(configuration(resample=resample), network=network)
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        volume, truth = scan(directions, spacing_mm)
        assert 2000 < truth.sum() < 0.2 * truth.size
        # Whatever axis is mixed up or reversed, the marker would not lie where it lies.
        assert max(dice(truth, np.flip(truth, axis)) for axis in range(3)) < 0.9
        labelmap = model.predict({"image": volume})
        assert labelmap.grid is volume.grid
        assert (labelmap.array.dtype, labelmap.array.shape) == (np.uint16, truth.shape)
        if resample:
            assert dice(labelmap.array == 1, truth) > 0.9, name
        else:
            assert np.array_equal(labelmap.array == 1, truth), name


@pytest.mark.parametrize(
    ("config", "network", "exact"),
    [
        (configuration(invert=False), NETWORK, True),
        (configuration(invert=False), PLAIN, True),
        (configuration(invert=False, resample=True), NETWORK, False),
        (configuration(invert=False, resample=True), PLAIN, False),
        (configuration(orient=False), NETWORK, True),
        (configuration(orient=False, invert=False), PLAIN, True),
        (
            configuration(
                pre=[{"_target_": "SpatialPadd", "keys": "image", "spatial_size": [96, 96, 96]}],
                inferer={"_target_": "SlidingWindowInferer", "roi_size": [48, 48, 48], "overlap": 0.25},
            ),
            NETWORK,
            True,
        ),
        (
            configuration(pre=[{"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "margin": 3}]),
            NETWORK,
            True,
        ),
    ],
    ids=["not inverted", "not inverted, plain", "not inverted, resampled", "not inverted, resampled, plain",
         "not oriented", "untouched", "padded, sliding window", "cropped"],
)  # fmt: skip
def test_what_bundles_do_with_geometry(load: Build, config: dict[str, Any], network: str, exact: bool) -> None:
    model = load(config, network=network)
    for name in ("coronal", "any rotation", "anisotropic"):
        volume, truth = scan(*GEOMETRIES[name])
        mask = model.predict({"image": volume}).array == 1
        assert np.array_equal(mask, truth) if exact else dice(mask, truth) > 0.9, name


def test_values_reach_the_network_as_they_are(load: Build) -> None:
    """The network sees every voxel once, at its place: it marks what exceeds a threshold between two noise values."""
    volume, _ = scan(GEOMETRIES["oblique"][0])
    noisy = np.random.default_rng(4).normal(500, 200, volume.array.shape).astype(np.float32)
    object.__setattr__(volume, "array", noisy)
    assert np.array_equal(load().predict({"image": volume}).array == 1, noisy > 500)
    assert np.array_equal(noisy, np.random.default_rng(4).normal(500, 200, noisy.shape).astype(np.float32))


def test_one_study_after_another(load: Build) -> None:
    """A warm model keeps nothing of the study before: sizes and grids change from run to run."""
    model = load(configuration(resample=True))
    sizes = [((2.5, 1.5, 1.5), (44, 70, 76)), ((4.0, 2.0, 2.0), (30, 50, 60)), ((2.0, 2.0, 2.0), (60, 60, 60))]
    for spacing_mm, shape in sizes:
        volume, truth = scan(AXIAL, spacing_mm, shape)
        assert dice(model.predict({"image": volume}).array == 1, truth) > 0.9
        empty = Volume(volume.array * 0, volume.grid, volume.slices, "1.3", "1.4", "CT", "HU")
        assert not model.predict({"image": empty}).array.any()
        assert not model._memory.sources
        assert model._evaluator.state.output is None
        assert model._evaluator.state.batch is None


# -- Nothing is written ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


def test_nothing_is_written_into_the_package_or_the_working_directory(
    load: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    config = configuration()
    config["postprocessing"]["transforms"] += [
        {"_target_": "monai.transforms.SaveImageD", "keys": "pred", "output_dir": "@output_dir"},
        {"_target_": "SaveImageDict", "keys": "pred", "output_dir": "@bundle_root"},
        {"_target_": "SaveClassificationd", "keys": "pred", "filename": "scores.csv", "output_dir": "@output_dir"},
    ]
    model = load(config)
    before = contents(tmp_path / "models")
    prefix, path = sys.pycache_prefix, list(sys.path)
    model.predict({"image": scan(AXIAL)[0]})
    model.close()
    assert contents(tmp_path / "models") == before
    assert "marker/scripts/net.py" in before
    assert not any("__pycache__" in path for path in before)
    assert not contents(tmp_path / "cwd")
    assert (sys.pycache_prefix, sys.path) == (prefix, path)


def test_compiled_files_in_the_package_are_not_run(load: Build, tmp_path: Path) -> None:
    """The digest leaves `__pycache__` out, so a file there must not be able to speak for its source."""
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('compiled code ran')")
    cache = tmp_path / "models" / "marker" / "scripts" / "__pycache__"
    cache.mkdir(parents=True)
    for module in ("net", "__init__"):
        py_compile.compile(
            str(evil),
            cfile=str(cache / f"{module}.{sys.implementation.cache_tag}.pyc"),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    volume, truth = scan(AXIAL)
    assert np.array_equal(load().predict({"image": volume}).array == 1, truth)


# -- What goes wrong ---------------------------------------------------------------------------------------------------

RAISING = NETWORK.replace("        return", "        raise ValueError('too dark\\nsecond line')\n        return")
ABROAD = NETWORK.replace("        return", "        raise SystemExit(3)\n        return")
WRAPPED = NETWORK.replace(
    "        return",
    "        try:\n            {}['kidney']\n        except KeyError:\n            raise ValueError('no kidney')\n"
    "        return",
)
FAIL_TO_RUN = [
    ("network raises", {"network": RAISING}, "ValueError: too dark (in scripts/net.py, line 6)"),
    ("network exits", {"network": ABROAD}, "SystemExit: 3 (in scripts/net.py, line 6)"),
    ("network explains", {"network": WRAPPED}, "ValueError: no kidney (in scripts/net.py, line 9)"),
    ("transform raises",
     {"config": configuration(pre=[{"_target_": "Lambdad", "keys": "image", "func": "$lambda image: image.kidney"}])},
     "AttributeError: 'MetaTensor' object has no attribute 'kidney' (in Lambdad)"),
    ("transform lacks a key",
     {"config": configuration(pre=[{"_target_": "ScaleIntensityd", "keys": "label"}])},
     "(in ScaleIntensityd)"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "bundle", "sentence"), FAIL_TO_RUN, ids=[case[0] for case in FAIL_TO_RUN])
def test_bundle_that_raises_is_a_model_error_without_a_traceback(
    *,
    load: Build,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    what: str,
    bundle: dict,
    sentence: str,
) -> None:
    caplog.set_level(logging.INFO)
    model = load(**bundle)
    for _ in range(2):  # and the model can be asked again
        with pytest.raises(ModelError) as refusal:
            model.predict({"image": scan(AXIAL)[0]})
        assert str(refusal.value).startswith("model marker could not run: "), what
        assert sentence in str(refusal.value)
        assert "\n" not in str(refusal.value)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err + caplog.text


FAIL_TO_LOAD = [
    ("syntax error", {"network": "def ("}, ["model marker could not be loaded: SyntaxError: ", "scripts/net.py"]),
    ("module missing", {"network": "import no_such_module"}, ["No module named 'no_such_module'", "scripts/net.py"]),
    ("constructor raises",
     {"network": NETWORK + "\n    def __init__(self):\n        raise ValueError('no licence')\n"},
     ["ValueError: no licence", "scripts"]),
    ("class missing", {"network": "import torch"}, ["scripts.net.Threshold"]),
    ("unknown reference", {"config": configuration(network="$@network_deff.to(@device)")}, ["network_deff"]),
    ("unknown argument", {"config": configuration(inferer={"_target_": "SimpleInferer", "rois": 3})},
     ["SimpleInferer", "rois"]),
    ("parts missing", {"config": {"network_def": {}, "dataset": {}}},
     ["inference.json of bundle marker has no inferer, evaluator, preprocessing"]),
    ("not JSON", {"files": {"configs/inference.json": "{"}}, ["model marker could not be loaded: "]),
    ("metadata missing", {"files": {"configs/metadata.json": "["}}, ["model marker could not be loaded: "]),
    ("override of nothing", {"overrides": {"infererr#overlap": 0.5}}, ["infererr"]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "bundle", "sentences"), FAIL_TO_LOAD, ids=[case[0] for case in FAIL_TO_LOAD])
def test_bundle_that_cannot_be_loaded_says_why(
    load: Build, capfd: pytest.CaptureFixture[str], what: str, bundle: dict, sentences: list[str]
) -> None:
    path = list(sys.path)
    with pytest.raises(ModelError) as refusal:
        load(**bundle)
    for sentence in ("marker", *sentences):
        assert sentence in str(refusal.value), what
    assert "\n" not in str(refusal.value)
    assert sys.path == path
    assert "Traceback" not in "".join(capfd.readouterr())


def test_bundle_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model absent could not be loaded: FileNotFoundError"):
        BundleModel(tmp_path / "absent", manifest(), "cpu")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModelError, match=r"bundle bare has no configs/inference\.json or inference\.yaml"):
        BundleModel(tmp_path / "bare", manifest(), "cpu")


WRONG_OUTPUT = [
    ("half the size", "image[:, :, ::2, ::2, ::2] > 500", "the model returned a map of shape"),
    ("cut", "image[:, :, :-1] > 500", "the model returned a map of shape"),
    ("plain and cut", "image.as_tensor()[:, :, 5:] > 500", "the model returned a map of shape"),
    ("one number", "image.amax() > 500", "the model returned a map of shape"),
    ("two dimensions", "image[:, :, :, :, 0] > 500", "the model returned a map of shape"),
    ("NaN", "image * float('nan')", "not finite"),
    ("fractions", "image / 3000", "fractional labels (such as 0.333)"),
    ("unknown labels", "image / 500", "labels [2] that dicom.yaml does not declare"),
    ("negative labels", "-image / 1000", "labels [-1] that dicom.yaml does not declare"),
    ("everything", "image > -1", "marked every voxel"),
]


@pytest.mark.parametrize("invert", [True, False], ids=["inverted", "not inverted"])
@pytest.mark.parametrize(("what", "expression", "sentence"), WRONG_OUTPUT, ids=[case[0] for case in WRONG_OUTPUT])
def test_output_that_is_no_result_is_refused(
    *, load: Build, what: str, expression: str, sentence: str, invert: bool
) -> None:
    model = load(configuration(invert=invert), network=NETWORK.replace("(image > 500)", f"({expression})"))
    volume, _ = scan(GEOMETRIES["coronal"][0])
    with pytest.raises((OutputRefused, ModelError)) as refusal:
        model.predict({"image": volume})
    if invert and isinstance(refusal.value, ModelError):  # MONAI's own inversion found the shape wrong
        assert "Invertd" in str(refusal.value), what
    else:
        assert sentence in str(refusal.value)


def test_result_under_another_key_is_named(load: Build) -> None:
    model = load(output="segmentation")
    with pytest.raises(ModelError) as refusal:
        model.predict({"image": scan(AXIAL)[0]})
    assert "returned no 'segmentation'" in str(refusal.value)
    assert "(there are image, label, pred)" in str(refusal.value)
    config = configuration()
    rename = {"_target_": "CopyItemsd", "keys": "pred", "names": "segmentation"}
    config["postprocessing"]["transforms"].append(rename)
    volume, truth = scan(AXIAL)
    assert np.array_equal(load(config, output="segmentation").predict({"image": volume}).array == 1, truth)


# -- Weights -----------------------------------------------------------------------------------------------------------

LINEAR = """\
import torch


class Threshold(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.limit = torch.nn.Parameter(torch.tensor(1e9))

    def forward(self, image):
        return (image > self.limit).to(torch.float32)
"""
CHECKPOINT = {
    "_target_": "CheckpointLoader",
    "load_path": "$@bundle_root + '/models/model.pt'",
    "load_dict": {"model": "@network"},
}


@pytest.mark.parametrize("nested", [False, True], ids=["state", "state under a key"])
def test_weights_are_those_of_the_file(load: Build, tmp_path: Path, nested: bool) -> None:
    path = tmp_path / "models" / "marker" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    state = {"limit": torch.tensor(500.0)}
    torch.save({"model": state, "epoch": 3} if nested else state, path)
    volume, truth = scan(AXIAL)
    model = load(configuration(handlers=[CHECKPOINT]), network=LINEAR)
    assert np.array_equal(model.predict({"image": volume}).array == 1, truth)


def test_weights_that_are_missing_or_others(load: Build, tmp_path: Path) -> None:
    path = tmp_path / "models" / "marker" / "models" / "model.pt"
    with pytest.raises(ModelError, match=r"the weights of bundle marker are missing: .*model\.pt"):
        load(configuration(handlers=[CHECKPOINT]), network=LINEAR)
    path.parent.mkdir(parents=True)
    torch.save({"another": torch.tensor(500.0)}, path)
    with pytest.raises(ModelError, match="model marker could not be loaded: RuntimeError: Error"):
        load(configuration(handlers=[CHECKPOINT]), network=LINEAR)
    torch.save({"limit": torch.tensor(float("nan"))}, path)
    with pytest.raises(ModelError, match="weights of bundle marker have values in limit that are not finite"):
        load(configuration(handlers=[CHECKPOINT]), network=LINEAR)


class RunsOnLoad:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_checkpoint_cannot_run_code(load: Build, tmp_path: Path) -> None:
    path = tmp_path / "models" / "marker" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    torch.save({"limit": torch.tensor(500.0), "extra": RunsOnLoad(tmp_path / "owned")}, path)
    with pytest.raises(ModelError, match="model marker could not be loaded: UnpicklingError"):
        load(configuration(handlers=[CHECKPOINT]), network=LINEAR)
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists(), "the checkpoint was harmless"


# -- Overrides and modules ---------------------------------------------------------------------------------------------


LIMITED = """\
import torch


class Threshold(torch.nn.Module):
    def __init__(self, limit=1e9):
        super().__init__()
        self.limit = limit

    def forward(self, image):
        return (image > self.limit).to(torch.float32)
"""


def test_overrides_of_the_manifest_count(load: Build) -> None:
    volume, truth = scan(AXIAL)
    assert not load(network=LIMITED).predict({"image": volume}).array.any()
    model = load(network=LIMITED, overrides={"network_def#limit": 500})
    assert np.array_equal(model.predict({"image": volume}).array == 1, truth)


LATE = """\
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        from scripts.parts import sign
        import weighing

        return (image * sign.SIGN * weighing.WEIGHT > 500).to(torch.float32)
"""


@pytest.mark.parametrize("initialised", [True, False], ids=["package", "namespace package"])
def test_packages_with_modules_of_the_same_names_do_not_mix(load: Build, tmp_path: Path, initialised: bool) -> None:
    """Both loaded at once, run by turns, importing when they are loaded and when they run."""
    models = {}
    for name, sign in (("plus", 1), ("minus", -1)):
        files = {"scripts/parts/sign.py": f"SIGN = {sign}", "weighing.py": f"WEIGHT = {sign * sign}"}
        models[sign] = load(name=name, network=LATE, files=files)
        if not initialised:
            (tmp_path / "models" / name / "scripts" / "__init__.py").unlink()
    volume, truth = scan(AXIAL)
    turned = Volume(-volume.array, volume.grid, volume.slices, "1.3", "1.4", "CT", "HU")
    for _ in range(2):
        for sign, model in models.items():
            for seen, marked in ((volume, sign == 1), (turned, sign == -1)):
                assert np.array_equal(model.predict({"image": seen}).array == 1, truth & marked)
        assert not [name for name in sys.modules if name.split(".")[0] in ("scripts", "weighing")]
    for model in models.values():
        model.close()


def test_own_modules_of_the_process_are_left_alone(load: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `scripts` of the host is neither used by a bundle nor lost by it."""
    host = type(sys)("scripts")
    monkeypatch.setitem(sys.modules, "scripts", host)
    volume, truth = scan(AXIAL)
    assert np.array_equal(load().predict({"image": volume}).array == 1, truth)
    assert sys.modules["scripts"] is host
    assert "scripts.net" not in sys.modules


def test_module_keeps_its_state_between_runs(load: Build) -> None:
    network = NETWORK.replace(
        "        return", "        COUNT.append(1)\n        assert len(COUNT) < 3\n        return"
    )
    model = load(network="COUNT = []\n" + network)
    volume, truth = scan(AXIAL)
    for _ in range(2):
        assert np.array_equal(model.predict({"image": volume}).array == 1, truth)
    with pytest.raises(ModelError, match="AssertionError"):
        model.predict({"image": volume})


# -- The check of every result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_label_map_of_any_type_becomes_uint16(dtype: type) -> None:
    grid = Grid((2, 3, 4), np.eye(4), "")
    array = np.zeros((2, 3, 4), dtype)
    array[1, 2, 3] = 1
    checked = check_labelmap(array, grid, {1: "Marker"})
    assert checked.dtype == np.uint16
    assert np.array_equal(checked, array)
    with pytest.raises(OutputRefused, match=r"of shape \(3, 2, 4\), the input's grid is \(2, 3, 4\)"):
        check_labelmap(array.reshape(3, 2, 4), grid, {1: "Marker"})
