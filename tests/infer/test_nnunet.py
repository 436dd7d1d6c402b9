"""nnU-Net v2 trained folders as its own trainer writes them: its real network, marking what is bright."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from node.dicom.volume import Volume
from node.errors import InputRefused, ModelError, OutputRefused
from node.infer.model import load_model
from node.infer.nnunet import NnUNetModel
from node.infer.package import load_package
from tests.infer.phantoms import AXIAL, GEOMETRIES, dice, scan, soft_scan

SPACING = [2.5, 1.5, 1.5]  # slice, row, column, as nnU-Net has it
PATCH = [24, 40, 40]


def plans(reader: str, channels: int, spacing: list[float]) -> dict[str, Any]:
    """What nnU-Net's planner writes, for a network of two stages."""
    resampling = {
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": PATCH,
        "median_image_size_in_voxels": PATCH,
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
        **resampling,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 4],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
                "strides": [[1, 1, 1], [2, 2, 2]],
                "n_conv_per_stage": [1, 1],
                "n_conv_per_stage_decoder": [1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset900_Marker",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": PATCH,
        "image_reader_writer": reader,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(index): {} for index in range(channels)},
    }


def mark_what_is_bright(network: torch.nn.Module) -> None:
    """Weights with which the last of the two classes wins where the first channel lies clearly above its mean."""
    for name, parameter in network.named_parameters():  # each under the first of its names
        value = parameter.data.zero_()
        if name.endswith("norm.weight"):
            value.fill_(1)
        elif name.startswith("encoder.stages.0") and name.endswith("conv.weight"):
            value[0, 0, 1, 1, 1] = 1
        elif name.startswith("decoder.stages.0") and name.endswith("conv.weight"):
            value[0, 4, 1, 1, 1] = 1  # the skip connection's channels follow those from below
        elif name.startswith("decoder.seg_layers") and name.endswith("weight"):
            value[1, 0] = 10
        elif name.startswith("decoder.seg_layers"):
            value[1] = -2


Build = Callable[..., NnUNetModel]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A trained folder by nnU-Net's own trainer, as a package, loaded."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # The trainer looks at what its data are stored as, before it is asked to train.
    preprocessed = tmp_path / "nnUNet_preprocessed" / "Dataset900_Marker" / "nnUNetPlans_3d_fullres"
    preprocessed.mkdir(parents=True)
    (preprocessed / "case.npz").touch()

    def build_package(
        reader: str = "NibabelIOWithReorient",
        settings: str = "",
        *,
        folds: tuple[str, ...] = ("0",),
        inputs: str = "{image: {}}",
        channels: int = 1,
        spacing: list[float] = SPACING,
        change: Callable[[dict[str, Any]], object] = lambda plans: None,
    ) -> NnUNetModel:
        folder = tmp_path / "marker"
        shutil.rmtree(folder, ignore_errors=True)
        made = plans(reader, channels, spacing)
        dataset = {
            "channel_names": {str(index): f"channel {index}" for index in range(channels)},
            "labels": {"background": 0, "marker": 1},
            "numTraining": 1,
            "file_ending": ".nii.gz",
        }
        for fold in folds:
            trainer = nnUNetTrainer(
                json.loads(json.dumps(made | {"continue_training": False})),
                "3d_fullres",
                int(fold),
                dataset,
                torch.device("cpu"),
            )
            trainer.initialize()
            trainer.logger.log("train_losses", np.float64(0.5), 0)
            mark_what_is_bright(trainer.network)
            trainer.inference_allowed_mirroring_axes = (0, 1, 2)
            (folder / f"fold_{fold}").mkdir(parents=True)
            trainer.save_checkpoint(str(folder / f"fold_{fold}" / "checkpoint_final.pth"))
        change(made)
        (folder / "plans.json").write_text(json.dumps(made))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        (folder / "dicom.yaml").write_text(
            "title: Marker\nadapter: nnunet\nversion: 3.0.0\nintended_use: Tests.\nlicence_code: Apache-2.0\n"
            f"licence_weights: none\ninputs: {inputs}\n"
            'segments: {1: {name: Marker, type: [99TEST, "1", Marker]}}\n'
            + (f"nnunet: {{{settings}}}\n" if settings else "")
        )
        model = load_model(load_package(folder), "cpu")
        assert isinstance(model, NnUNetModel)
        return model

    return build_package


# -- Geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "settings"),
    [("NibabelIOWithReorient", "mirroring: false"), ("SimpleITKIO", "orientation: LPS, mirroring: false")],
)
def test_mask_lies_where_the_marker_lies(build: Build, reader: str, settings: str) -> None:
    """nnU-Net resamples where the spacing is not that of its training."""
    model = build(reader, settings)
    for name, (directions, spacing_mm) in GEOMETRIES.items():
        volume, truth = soft_scan(directions, spacing_mm)
        labelmap = model.predict({"image": volume})
        assert labelmap.grid is volume.grid
        assert (labelmap.array.dtype, labelmap.array.shape) == (np.uint16, truth.shape)
        found = labelmap.array == 1
        # The network marks from a little above the mean: the marker and the rim around it where its values rise.
        rim = volume.array > 0
        assert (found & ~rim).sum() <= 0.02 * truth.sum(), name
        assert (truth & ~found).sum() <= 0.02 * truth.sum(), name
        assert max(dice(found, np.flip(found, axis)) for axis in range(3)) < 0.95


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient", "NibabelIO", "SimpleITKIO"])
def test_network_is_given_what_nnunets_own_reader_gives(build: Build, tmp_path: Path, reader: str) -> None:
    """For the readers that keep a file's order of axes, of a file in the orientation that the manifest says."""
    own = recursive_find_reader_writer_by_name(reader)()
    seen: list[tuple[np.ndarray, dict[str, Any]]] = []
    for orientation in ("LPS",) if "Reorient" in reader else ("LPS", "RAS", "PIL"):
        settings = "" if "Reorient" in reader else f"orientation: {orientation}"
        model = build(reader, settings)
        predict = model._predictor.predict_single_npy_array

        def look(
            array: np.ndarray, properties: dict[str, Any], *rest: object, predict: Callable[..., np.ndarray] = predict
        ) -> np.ndarray:
            seen.append((array, properties))
            return predict(array, properties, *rest)

        model._predictor.predict_single_npy_array = look
        for name in ("axial", "coronal", "sagittal", "descending", "oblique", "anisotropic"):
            volume, _ = scan(*GEOMETRIES[name], (24, 40, 44))
            noisy = np.random.default_rng(4).normal(0, 1, volume.array.shape).astype(np.float32)
            volume = replace(volume, array=volume.array + noisy)
            model.predict({"image": volume})
            image = nibabel.Nifti1Image(volume.array.transpose(2, 1, 0), volume.grid.affine_ras)
            if "Reorient" not in reader:
                turn = nibabel.orientations.ornt_transform(
                    nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
                )
                image = image.as_reoriented(turn)
            nibabel.save(image, tmp_path / "image.nii.gz")
            array, properties = own.read_images((str(tmp_path / "image.nii.gz"),))
            given, ours = seen.pop()
            assert np.array_equal(given, array), (name, orientation)
            assert ours["spacing"] == pytest.approx(properties["spacing"], rel=1e-4), (name, orientation)


def test_reader_that_keeps_the_files_axes_needs_an_orientation(build: Build) -> None:
    with pytest.raises(
        ModelError, match=r"reader SimpleITKIO, which keeps the order of axes.*say as nnunet\.orientation"
    ):
        build("SimpleITKIO")
    with pytest.raises(ModelError, match=r"makes every image RAS; remove nnunet\.orientation"):
        build("NibabelIOWithReorient", "orientation: LPS")
    with pytest.raises(ModelError, match="files that NaturalImage2DIO read, which are no volumes"):
        build("NaturalImage2DIO")


def test_folds_and_inputs(build: Build) -> None:
    volume, truth = scan(AXIAL, (2.5, 1.5, 1.5), (24, 48, 52))
    model = build(settings="folds: ['0', '1'], mirroring: false", folds=("0", "1"), inputs="{a: {}, b: {}}", channels=2)
    empty = replace(volume, array=volume.array * 0)
    assert np.array_equal(model.predict({"b": empty, "a": volume}).array == 1, truth)
    assert not model.predict({"a": empty, "b": volume}).array.any()
    with pytest.raises(InputRefused, match="different grids"):
        model.predict({"a": volume, "b": scan(GEOMETRIES["coronal"][0])[0]})
    with pytest.raises(ModelError, match=r"takes 2 inputs \(channel 0, channel 1\); dicom\.yaml declares 1"):
        build(channels=2)
    with pytest.raises(ModelError, match=r"fold_3/checkpoint_final\.pth is missing"):
        build(settings="folds: ['3']")


def test_label_that_the_manifest_does_not_know_is_refused(build: Build, tmp_path: Path) -> None:
    model = build(settings="mirroring: false")
    known = model._manifest
    model._manifest = known.model_copy(update={"segments": {7: known.segments[1]}})
    with pytest.raises(OutputRefused, match=r"labels \[1\] that dicom\.yaml does not declare"):
        model.predict({"image": scan(AXIAL)[0]})


# -- What a trained folder may not do ----------------------------------------------------------------------------------


class RunsOnLoad:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_checkpoint_cannot_run_code(build: Build, tmp_path: Path) -> None:
    build()
    path = tmp_path / "marker" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "logging": RunsOnLoad(tmp_path / "owned")}, path)
    with pytest.raises(ModelError, match=r"fold_0/checkpoint_final\.pth cannot be read as weights"):
        load_model(load_package(tmp_path / "marker"), "cpu")
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists(), "the checkpoint was harmless"
    path.write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        load_model(load_package(tmp_path / "marker"), "cpu")
    torch.save({"network_weights": {}}, path)
    with pytest.raises(ModelError, match="has no trainer_name, init_args"):
        load_model(load_package(tmp_path / "marker"), "cpu")


@pytest.mark.parametrize(
    ("key", "value"), [("network_class_name", "subprocess.Popen"), ("arch_kwargs.nonlin", "os.system")]
)
def test_plans_cannot_name_any_code(build: Build, key: str, value: str) -> None:
    def change(made: dict[str, Any]) -> None:
        place = made["configurations"]["3d_fullres"]["architecture"]
        *steps, last = key.split(".")
        for step in steps:
            place = place[step]
        place[last] = value

    with pytest.raises(ModelError, match=rf"plans\.json builds its network of {value}; expected"):
        build(change=change)


def test_nothing_is_printed(build: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = build()
    capfd.readouterr()
    model = load_model(load_package(tmp_path / "marker"), "cpu")
    assert isinstance(model, NnUNetModel)
    volume: Volume = scan(AXIAL, (2.5, 1.5, 1.5), (24, 48, 52))[0]
    model.predict({"image": volume})
    assert "".join(capfd.readouterr()) == ""
    model.close()
    with pytest.raises(ModelError, match="was closed"):
        model.predict({"image": volume})


# -- Probabilities -----------------------------------------------------------------------------------------------------


def with_probabilities(folder: Path) -> NnUNetModel:
    """The package that was built, with the manifest's switch on."""
    text = (folder / "dicom.yaml").read_text()
    (folder / "dicom.yaml").write_text(text + "probabilities: true\n")
    model = load_model(load_package(folder), "cpu")
    assert isinstance(model, NnUNetModel)
    return model


def test_probabilities_are_the_softmax_on_the_images_grid_and_change_no_label(build: Build, tmp_path: Path) -> None:
    model = build(settings="mirroring: false")
    volume, truth = soft_scan(*GEOMETRIES["oblique"])
    without = model.predict({"image": volume})
    labelmap = with_probabilities(tmp_path / "marker").predict({"image": volume})
    assert without.probabilities is None
    assert np.array_equal(labelmap.array, without.array)
    assert labelmap.probabilities is not None
    certain = labelmap.probabilities[1]
    assert (certain.dtype, certain.shape) == (np.uint8, truth.shape)
    undecided = np.abs(certain.astype(int) - 127.5) < 1
    assert np.array_equal((certain > 127)[~undecided], labelmap.array[~undecided] == 1)
    assert undecided.mean() < 0.05
    assert certain[truth].mean() > 200
    assert certain[volume.array == 0].mean() < 60


def test_a_model_of_regions_has_no_probabilities_of_labels(build: Build, tmp_path: Path) -> None:
    build()
    dataset = json.loads((tmp_path / "marker" / "dataset.json").read_text())
    dataset |= {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    (tmp_path / "marker" / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ModelError, match=r"trained on regions, .*: set probabilities to false"):
        with_probabilities(tmp_path / "marker")
