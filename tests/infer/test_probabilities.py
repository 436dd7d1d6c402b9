"""Probabilities beside the labels: what they are, that they change no label, and when they are not to be had."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from node.dicom.regrid import make_regular
from node.dicom.volume import Image, SliceRef, Volume
from node.errors import ModelError, OutputRefused
from node.infer.bundle import BundleModel
from node.infer.hosted import HostedModel
from node.infer.inspection import inspect_package
from node.infer.manifest import Manifest
from node.infer.network import NetworkModel
from node.infer.package import load_package
from node.infer.poststeps import Recipe, probability_recipe
from node.infer.reduce import to_certainties, to_labels
from node.infer.regular import prediction_as_sent
from node.infer.results import NO_PROBABILITIES, Labelmap, Prediction
from node.infer.sliding import SlabSlidingWindowInferer
from node.infer.wire import Channel, bytes_of, describe_prediction, restore_prediction
from tests.infer.phantoms import GEOMETRIES, soft_scan
from tests.infer.test_bounded import ARGMAX, HALF, INVERT, LARGEST, SIGMOID, SOFTMAX, bundle
from tests.infer.test_bundle import configuration, manifest
from tests.infer.test_network import Threshold
from tests.infer.test_regular import tilted

TWO = """\
import torch


class Threshold(torch.nn.Module):
    def forward(self, image):
        logit = (image - 500) / 250
        return torch.cat([-logit, logit], dim=1)
"""
ONE = TWO.replace("torch.cat([-logit, logit], dim=1)", "2 * logit")
SOFT = TWO.replace("torch.cat([-logit, logit], dim=1)", "torch.cat([-logit, logit], dim=1).softmax(1)")
WINDOW = {"_target_": "SlidingWindowInferer", "roi_size": [32, 32, 32], "overlap": 0.25, "mode": "gaussian"}
WHOLE = {"_target_": "SimpleInferer"}


ABOUT: dict[str, Any] = {
    "title": "Marker",
    "intended_use": "Tests.",
    "licence_code": "Apache-2.0",
    "licence_weights": "none",
    "inputs": {"image": {}},
    "segments": {1: {"name": "Marker", "type": ["99TEST", "1", "Marker"]}},
}


def truth(volume: Volume | Image) -> NDArray[np.float64]:
    """What every network here gives as the probability of a voxel, 0 to 255."""
    return 255 / (1 + np.exp(-2 * (np.asarray(volume.array, np.float64) - 500) / 250))


def write_bundle(folder: Path, network: str, config: dict[str, Any], **parts: Any) -> Path:
    contents = {
        "configs/inference.json": json.dumps(config),
        "configs/metadata.json": json.dumps({"version": "0.1.0"}),
        "scripts/__init__.py": "",
        "scripts/net.py": network,
        "dicom.yaml": json.dumps(ABOUT | parts),
    }
    for path, text in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def steps(*chain: dict[str, Any], inferer: dict[str, Any], resample: bool) -> dict[str, Any]:
    """A bundle's configuration with this post-processing."""
    post = {"_target_": "Compose", "transforms": [dict(step) for step in chain]}
    return configuration(resample=resample, inferer=dict(inferer), postprocessing=post)


def predict(folder: Path, source: Volume | Image, **parts: Any) -> Labelmap:
    model = BundleModel(folder, manifest(**parts), "cpu")
    labelmap = model.predict({"image": source})
    model.close()
    assert isinstance(labelmap, Labelmap)
    return labelmap


CHAINS: dict[str, tuple[str, tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "softmax, argmax, inversion": (TWO, (SOFTMAX, ARGMAX, INVERT), WINDOW),
    "argmax of logits, inversion": (TWO, (ARGMAX, INVERT), WINDOW),
    "argmax of a network's own softmax": (SOFT, (ARGMAX, INVERT), WINDOW),
    "softmax, inversion, argmax": (TWO, (SOFTMAX, INVERT, ARGMAX), WINDOW),
    "softmax, inversion, argmax, without windows": (TWO, (SOFTMAX, INVERT, ARGMAX), WHOLE),
    "sigmoid, inversion, threshold": (ONE, (SIGMOID, INVERT, HALF), WINDOW),
    "inversion, sigmoid, threshold": (ONE, (INVERT, SIGMOID, HALF), WINDOW),
    "sigmoid, threshold, largest component, inversion": (
        ONE,
        (SIGMOID, HALF, LARGEST, INVERT | {"nearest_interp": True}),
        WHOLE,
    ),
    "no inversion": (TWO, (SOFTMAX, ARGMAX), WHOLE),
}


@pytest.mark.parametrize("resample", [False, True], ids=["as is", "resampled"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_bundles_probabilities_are_its_networks_and_change_no_label(
    tmp_path: Path, chain: str, resample: bool
) -> None:
    network, post, inferer = CHAINS[chain]
    folder = write_bundle(tmp_path / "marker", network, steps(*post, inferer=inferer, resample=resample))
    volume, _ = soft_scan(*GEOMETRIES["oblique"])
    without = predict(folder, volume)
    labelmap = predict(folder, volume, probabilities=True)
    assert without.probabilities is None
    assert np.array_equal(labelmap.array, without.array)
    assert labelmap.remarks == without.remarks
    assert labelmap.probabilities is not None
    assert list(labelmap.probabilities) == [1]
    certain = labelmap.probabilities[1]
    assert (certain.dtype, certain.shape) == (np.uint8, volume.array.shape)
    assert certain.max() > 240
    if not resample:
        assert np.abs(certain - truth(volume)).max() <= 1, "one step of rounding"
    else:  # what was averaged over 2 mm and back
        assert np.mean(np.abs(certain - truth(volume))) < 1
    undecided = np.abs(certain.astype(int) - 127.5) < (3 if not resample else 60)
    assert np.array_equal((certain > 127)[~undecided], labelmap.array[~undecided] == 1)
    assert undecided.mean() < 0.1


def test_frames_have_probabilities_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    frames = tuple(SliceRef("1.2", "1.3", number) for number in (1, 2))
    image = Image(rng.uniform(0, 1000, (2, 40, 56)).astype(np.float32), frames, "1.4", "1.5", "US")
    config = steps(SOFTMAX, ARGMAX, inferer=WHOLE, resample=False)
    config["preprocessing"]["transforms"] = [
        step for step in config["preprocessing"]["transforms"] if step["_target_"] != "Orientationd"
    ]
    folder = write_bundle(tmp_path / "marker", TWO, config)
    labelmap = predict(folder, image, probabilities=True, inputs={"image": {"kind": "image"}})
    assert labelmap.probabilities is not None
    assert np.abs(labelmap.probabilities[1] - truth(image)).max() <= 1


def test_values_that_are_no_probabilities_are_said_to_be_none(tmp_path: Path) -> None:
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    for inferer in (WINDOW, WHOLE):
        folder = write_bundle(tmp_path / "marker", ONE, steps(INVERT, HALF, inferer=inferer, resample=False))
        labelmap = predict(folder, volume, probabilities=True)
        assert labelmap.probabilities is None
        assert labelmap.remarks == (NO_PROBABILITIES,)
        assert np.array_equal(labelmap.array, predict(folder, volume).array)


LAMBDA = {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (bundle(SOFTMAX, LAMBDA, INVERT, ARGMAX), "a step Lambda before the decision"),
        (bundle(SIGMOID, INVERT, HALF, LAMBDA), "a step Lambda after the decision"),
        (bundle(SOFTMAX, INVERT), "no AsDiscreted"),
        (bundle(SOFTMAX | {"sigmoid": "@multilabel"}, INVERT, HALF), "neither a softmax nor a sigmoid"),
        (bundle(SIGMOID, INVERT, HALF | {"threshold": 0}), "neither an argmax nor a threshold above 0"),
        (bundle(SOFTMAX, INVERT | {"post_func": "$lambda x: x"}, ARGMAX), "a function of its own"),
        (bundle(SOFTMAX, ARGMAX | {"_disabled_": "@soft"}), "not known before"),
        (
            bundle(*({**step, "keys": ["pred", "label"]} for step in (SIGMOID, INVERT, HALF))),
            "more than the prediction",
        ),
        (bundle(SIGMOID, HALF, evaluator={"inferer": "@inferer", "postprocessing": "@o"}), "another post-processing"),
    ],
)
def test_a_bundle_whose_steps_are_not_known_has_none(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=rf"probabilities are not available .* because .*{why}.*: set probabilities"):
        probability_recipe(config)


def test_recipes() -> None:
    assert probability_recipe(bundle(ARGMAX, LARGEST, INVERT)) == Recipe("softmax", "none", assumed=True, masks=False)
    assert probability_recipe(bundle(INVERT, SIGMOID, HALF)) == Recipe("none", "sigmoid", assumed=False, masks=True)


def test_verifying_and_loading_a_bundle_that_has_none_say_so(tmp_path: Path) -> None:
    config = steps(SIGMOID, INVERT, HALF, LAMBDA, inferer=WINDOW, resample=False)
    folder = write_bundle(tmp_path / "marker", ONE, config, probabilities=True)
    (remark,) = (found for found in inspect_package(load_package(folder)) if found.verdict == "wrong")
    assert "Lambda after the decision" in remark.says
    with pytest.raises(ModelError, match="Lambda after the decision"):
        BundleModel(folder, manifest(probabilities=True), "cpu")


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"task": "detection", "segments": {}, "classes": {0: {"name": "A", "type": ["99T", "1", "A"]}}}, "detection"),
        ({"adapter": "command", "version": "1", "command": {"run": ["x"]}}, "returns labels only"),
    ],
)
def test_a_manifest_that_cannot_have_any(parts: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        manifest(probabilities=True, **parts)


# -- Bare networks -----------------------------------------------------------------------------------------------------


class One(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image[:, :1] - 500) / 125


NETWORKS = {
    "softmax": (Threshold(), {}),
    "resampled": (Threshold(), {"spacing_mm": [2.0, 2.0, 2.0]}),
    "sigmoid, cropped": (One(), {"activation": "sigmoid", "decision": "threshold", "size": [60, 60, 40]}),
    "nearest": (Threshold(), {"spacing_mm": [2.0, 2.0, 2.0], "back": "nearest"}),
}


def load_network(folder: Path, network: torch.nn.Module, settings: dict[str, Any], **parts: Any) -> NetworkModel:
    folder.mkdir(exist_ok=True)
    torch.jit.script(network.eval()).save(str(folder / "net.ts"))
    about = {"adapter": "torchscript", "version": "1", "network": {"file": "net.ts", **settings}, **parts}
    return NetworkModel(folder, manifest(**about), "cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bare_networks_probabilities(tmp_path: Path, name: str) -> None:
    network, settings = NETWORKS[name]
    volume, _ = soft_scan(*GEOMETRIES["oblique"])
    without = load_network(tmp_path / "net", network, settings).predict({"image": volume})
    labelmap = load_network(tmp_path / "net", network, settings, probabilities=True).predict({"image": volume})
    assert isinstance(labelmap, Labelmap)
    assert isinstance(without, Labelmap)
    assert np.array_equal(labelmap.array, without.array)
    assert labelmap.probabilities is not None
    certain = labelmap.probabilities[1]
    difference = np.abs(certain - truth(volume))
    if name == "softmax":
        assert difference.max() <= 1
    elif "cropped" in name:
        inside = certain > 0
        assert 0.1 < inside.mean() < 0.9, "what the network did not see has a probability of 0"
        assert difference[inside].max() <= 1
    else:
        assert difference.mean() < 1
    undecided = np.abs(certain.astype(int) - 127.5) < (3 if name in ("softmax", "sigmoid, cropped") else 60)
    assert np.array_equal((certain > 127)[~undecided], labelmap.array[~undecided] == 1)


def test_a_bare_network_whose_values_are_none(tmp_path: Path) -> None:
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    model = load_network(tmp_path / "net", Threshold(), {"activation": "none"}, probabilities=True)
    labelmap = model.predict({"image": volume})
    assert isinstance(labelmap, Labelmap)
    assert labelmap.probabilities is None
    assert labelmap.remarks == (NO_PROBABILITIES,)


# -- Slab by slab ------------------------------------------------------------------------------------------------------


def test_slab_by_slab_they_are_those_of_all_logits_at_once() -> None:
    torch.manual_seed(3)
    network = torch.nn.Conv3d(1, 4, 3, padding=1).requires_grad_(False)
    image = torch.randn(1, 1, 37, 20, 22)
    settings: dict[str, Any] = {"roi_size": (16, 12, 12), "overlap": 0.5, "mode": "gaussian"}
    inferer = SlabSlidingWindowInferer(**settings, reduce=to_labels(), beside=to_certainties("softmax"))
    labels, kept = inferer(image, network), inferer.kept_beside
    logits = SlabSlidingWindowInferer(**settings, reduce=lambda values: values.clone())(image, network)
    assert kept is not None
    assert torch.equal(kept[0], logits[0].softmax(0).mul(255).round().to(torch.uint8))
    assert torch.equal(labels, SlabSlidingWindowInferer(**settings, reduce=to_labels())(image, network))


# -- Where they go -----------------------------------------------------------------------------------------------------


def test_through_the_confined_process(tmp_path: Path) -> None:
    config = steps(SOFTMAX, ARGMAX, INVERT, inferer=WINDOW, resample=False)
    folder = write_bundle(tmp_path / "marker", TWO, config, probabilities=True)
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    here = predict(folder, volume, probabilities=True)
    model = HostedModel(load_package(folder), "cpu")
    try:
        there = model.predict({"image": volume})
    finally:
        model.close()
    assert isinstance(there, Labelmap)
    assert here.probabilities is not None
    assert there.probabilities is not None
    assert np.array_equal(there.array, here.array)
    assert np.array_equal(there.probabilities[1], here.probabilities[1])


def three() -> Manifest:
    segments = {value: {"name": f"S{value}", "type": ["99TEST", str(value), "S"]} for value in (2, 5, 7)}
    return manifest(probabilities=True, segments=segments)


def labelled(volume: Volume) -> Labelmap:
    array = np.zeros(volume.array.shape, np.uint16)
    found = {label: np.zeros(volume.array.shape, np.uint8) for label in (5, 7)}
    found[5][3:9, 4, :] = 200
    found[7][-1, -1, -1] = 9
    return Labelmap(array, volume.grid, probabilities=found)


def carried(labelmap: Labelmap, about: Manifest, volume: Volume, **other: Any) -> Prediction:
    """What comes out of the wire's other end; `other` replaces parts of the message."""
    here, there = socket.socketpair()
    with here, there:
        message, arrays = describe_prediction(labelmap, about, {"image": volume})
        sender = threading.Thread(target=Channel(here).send, args=(message | other, arrays))
        sender.start()
        end = Channel(there)
        got = end.receive()
        sizes: list[int] = []

        def receive(array: NDArray[Any]) -> None:
            sizes.append(array.nbytes)
            view = bytes_of(array)
            while len(view):
                view = view[end.read_into(view) :]

        try:
            prediction = restore_prediction(got, about, {"image": volume}, receive)
            assert sum(sizes) == got["bytes"]
            return prediction
        finally:
            there.shutdown(socket.SHUT_RDWR)
            sender.join()


def test_the_wire_carries_what_is_filled_and_nothing_else() -> None:
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    labelmap, about = labelled(volume), three()
    got = carried(labelmap, about, volume)
    assert isinstance(got, Labelmap)
    assert got.array.dtype == np.uint16
    assert labelmap.probabilities is not None
    assert got.probabilities is not None
    assert list(got.probabilities) == [5, 7]
    for label, values in labelmap.probabilities.items():
        assert np.array_equal(got.probabilities[label], values)


def test_labels_beyond_a_byte_come_through() -> None:
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    about = manifest(segments={300: {"name": "S", "type": ["99TEST", "1", "S"]}})
    array = np.zeros(volume.array.shape, np.uint16)
    array[1, 2, 3] = 300
    got = carried(Labelmap(array, volume.grid), about, volume)
    assert isinstance(got, Labelmap)
    assert np.array_equal(got.array, array)


@pytest.mark.parametrize(
    "said",
    [[0, 1], {"5": [0, 99999]}, {"5": [-1, 2]}, {"5": [4, 2]}, {"5": [0.0, 2.0]}, {"5": "all"}, {"5": [True, 2]}],
)
def test_the_worker_believes_no_slices(said: object) -> None:
    volume, _ = soft_scan(*GEOMETRIES["axial"])
    with pytest.raises(OutputRefused):
        carried(labelled(volume), three(), volume, probabilities=said)


def test_tilted_slices_get_them_back_blended(shared_data: Path) -> None:
    source = tilted(shared_data)
    seen = make_regular(source)

    # A plane wave in patient space, which linear interpolation keeps but for what it rounds.
    def wave(volume: Volume, places: NDArray[np.float64]) -> NDArray[np.float64]:
        return (127 + 100 * np.sin(places @ np.array([0.004, 0.01, 0.006]))).reshape(volume.array.shape)

    def places(volume: Volume) -> NDArray[np.float64]:
        slices, rows, columns = np.indices(volume.array.shape)
        inside = np.stack([columns, rows, np.zeros_like(rows)], axis=-1) @ volume.grid.affine_lps[:3, :3].T
        if volume.positions_lps is not None:
            return inside + volume.positions_lps[:, None, None, :]
        return volume.grid.to_lps(np.stack([columns, rows, slices], axis=-1).reshape(-1, 3).astype(np.float64)).reshape(
            inside.shape
        )

    values = np.rint(wave(seen, places(seen))).astype(np.uint8)
    labelmap = Labelmap(np.zeros(seen.array.shape, np.uint16), seen.grid, probabilities={2: values})
    back = prediction_as_sent(labelmap, seen, source)
    assert isinstance(back, Labelmap)
    assert back.probabilities is not None
    got = back.probabilities[2]
    assert got.shape == source.array.shape
    inside = got[1:-1, 2:-2, 2:-2].astype(float)
    assert np.abs(inside - wave(source, places(source))[1:-1, 2:-2, 2:-2]).max() < 1.6
