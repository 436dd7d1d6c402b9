"""A published, trained network as a package: MeshNet on a real, oblique T1 MR of a head.

There is no ground truth for this head. What is tested is what anatomy and a second reading of the head say: volumes
within what adults have, white matter inside grey matter, and the left half of the head on the left, which is found
without the network from the position of the anatomy in patient coordinates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from node.dicom.assembly import assemble_volumes
from node.dicom.header import read_header, scan_folder
from node.dicom.pixels import read_volume
from node.dicom.volume import Volume
from node.infer.model import load_model
from node.infer.network import NetworkModel
from node.infer.package import load_package
from node.infer.results import Labelmap
from tests.infer.phantoms import dice

MANIFEST = """\
title: MeshNet tissue
adapter: {adapter}
version: 1.0.0
intended_use: Tests.
licence_code: MIT
licence_weights: MIT
inputs: {{image: {{when: {{Modality: MR}}}}}}
segments:
  1: {{name: White matter, type: [SCT, 389081007, White matter]}}
  2: {{name: Grey matter, type: [SCT, 389080008, Grey matter]}}
network:
  file: {file}
  orientation: LIA
  spacing_mm: [1, 1, 1]
  intensity: [{{clip_percentiles: [0, 99.9]}}, {{scale_percentiles: [0, 100]}}]
  size: [256, 256, 256]
"""


def read_meshnet(folder: Path) -> nn.Sequential:
    """The layers of a TensorFlow.js MeshNet (weights README), with its weights."""
    description = json.loads((folder / "model.json").read_text())
    raw = np.fromfile(folder / "model.bin", "<f4")
    weights: dict[str, torch.Tensor] = {}
    place = 0
    for entry in description["weightsManifest"][0]["weights"]:
        size = int(np.prod(entry["shape"]))
        weights[entry["name"]] = torch.tensor(raw[place : place + size].reshape(entry["shape"]))
        place += size
    assert place == raw.size
    layers: list[nn.Module] = []
    channels = 1
    for layer in description["modelTopology"]["model_config"]["config"]["layers"]:
        config = layer["config"]
        if layer["class_name"] == "Activation":
            layers.append({"relu": nn.ReLU, "elu": nn.ELU}[config["activation"]]())
        elif layer["class_name"] == "Conv3D":
            dilation, kernel = config["dilation_rate"][0], config["kernel_size"][0]
            convolution = nn.Conv3d(
                channels, config["filters"], kernel, padding=dilation * (kernel // 2), dilation=dilation
            )
            convolution.weight.data = weights[f"{config['name']}/kernel"].permute(4, 3, 0, 1, 2).contiguous()
            assert convolution.bias is not None
            convolution.bias.data = weights[f"{config['name']}/bias"]
            layers.append(convolution)
            channels = config["filters"]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def head(shared_data: Path) -> Volume:
    files = scan_folder(shared_data / "brain_mr_t1").files
    (plan,) = assemble_volumes({file: read_header(file) for file in files}).volumes
    volume = read_volume(plan)
    # Every second voxel of 0.67 mm: the network sees 1 mm in any case, and the tests cost an eighth.
    affine = volume.grid.affine_lps @ np.diag([2.0, 2.0, 2.0, 1.0])
    array = np.ascontiguousarray(volume.array[::2, ::2, ::2])
    grid = replace(volume.grid, shape=array.shape, affine_lps=affine)
    return replace(volume, array=array, grid=grid, slices=volume.slices[::2])


Build = Callable[[str], NetworkModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Build:
    def build_package(adapter: str) -> NetworkModel:
        folder = tmp_path_factory.mktemp(adapter)
        network = read_meshnet(shared_data.parent / "weights" / "meshnet" / "model5_gw_ae")
        if adapter == "torchscript":
            torch.jit.script(network).save(str(folder / "meshnet.ts"))
        else:
            program = torch.export.export(network, (torch.zeros(1, 1, 256, 256, 256),))
            torch.export.save(program, folder / "meshnet.pt2")
        file = "meshnet.ts" if adapter == "torchscript" else "meshnet.pt2"
        (folder / "dicom.yaml").write_text(MANIFEST.format(adapter=adapter, file=file))
        model = load_model(load_package(folder), "cpu")
        assert isinstance(model, NetworkModel)
        return model

    return build_package


@pytest.fixture(scope="module")
def tissue(build: Build, head: Volume) -> NDArray[np.uint16]:
    result = build("torchscript").predict({"image": head})
    assert isinstance(result, Labelmap)
    return result.array


def brain_of(tissue: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """The largest connected part, without the few specks in the neck."""
    parts, count = ndimage.label(tissue > 0)
    assert count > 0
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def in_lps(volume: Volume, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    slice_, row, column = np.nonzero(mask)
    return volume.grid.to_lps(np.stack([column, row, slice_], axis=1))


def test_volumes_are_those_of_an_adult(tissue: NDArray[np.uint16], head: Volume) -> None:
    brain = brain_of(tissue)
    white, grey = ((tissue[brain] == label).sum() * head.grid.voxel_volume_mm3 / 1000 for label in (1, 2))
    assert 300 < white < 750, white
    assert 400 < grey < 950, grey
    # Grey matter surrounds white matter: it is what lies next to what is no brain.
    surface = brain & ~ndimage.binary_erosion(brain)
    assert (tissue[surface] == 2).mean() > 0.6


def test_brain_lies_where_the_head_is(tissue: NDArray[np.uint16], head: Volume) -> None:
    """In the upper half of the head, in the middle between its sides, by the head's own outline."""
    brain = in_lps(head, brain_of(tissue))
    outline = in_lps(head, ndimage.binary_opening(head.array > 0.15 * np.percentile(head.array, 99), iterations=2))
    low, high = np.percentile(outline, [1, 99], axis=0)
    assert brain[:, 2].mean() > (low[2] + high[2]) / 2
    across = np.median(outline[outline[:, 2] > brain[:, 2].mean()][:, 0])
    assert abs(brain[:, 0].mean() - across) < 8


def test_left_is_left(build: Build, tissue: NDArray[np.uint16], head: Volume) -> None:
    """A head is nearly symmetric, so one side is marked: the image is empty on the left of the left hemisphere.

    The region is chosen in patient coordinates (+x is the patient's left). A swap of left and right on the way to the
    network or back would lose the other side's tissue.
    """
    every = np.stack(np.nonzero(np.ones(head.array.shape, bool))[::-1], axis=1)
    brain = brain_of(tissue)
    x = head.grid.to_lps(every)[:, 0].reshape(head.array.shape) - np.median(in_lps(head, brain)[:, 0])
    result = build("torchscript").predict({"image": replace(head, array=np.where(x > 25, 0, head.array))})
    assert isinstance(result, Labelmap)
    left, right = brain & (x > 30), brain & (x < -30)
    assert left.sum() > 0.1 * brain.sum()
    assert (result.array[left] > 0).mean() < 0.05
    assert (result.array[right] > 0).mean() > 0.8


def test_both_packagings_give_the_same(build: Build, tissue: NDArray[np.uint16], head: Volume) -> None:
    result = build("torch-export").predict({"image": head})
    assert isinstance(result, Labelmap)
    for label in (1, 2):
        assert dice(result.array == label, tissue == label) > 0.999
