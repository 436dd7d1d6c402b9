"""Slab by slab beside MONAI's own sliding windows: the same numbers, in the memory of one slab."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import decollate_batch, list_data_collate
from monai.inferers.inferer import SliceInferer, SlidingWindowInferer

from node.errors import ModelError
from node.infer.reduce import to_labels, to_masks, to_values
from node.infer.sliding import SlabSlidingWindowInferer
from tests.benchmark.many_classes import CHECKOUT


def network(classes: int = 5, dims: int = 3) -> torch.nn.Module:
    """A convolution that sees its neighbours: a window's border differs from what another window has there."""
    torch.manual_seed(7)
    kind = torch.nn.Conv3d if dims == 3 else torch.nn.Conv2d
    return kind(1, classes, 3, padding=1).requires_grad_(False)


def image(*shape: int, batch: int = 1) -> MetaTensor:
    """Noise with a geometry, collated as a loader does."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    affine = torch.diag(torch.tensor([-0.7, -0.8, 2.5, 1.0], dtype=torch.float64))
    items = [{"image": MetaTensor(torch.randn(1, *shape, generator=generator), affine=affine)} for _ in range(batch)]
    return list_data_collate(items)["image"]


def both(inputs: torch.Tensor, net: Any, reduce: Any, *args: Any, slab_dim: int | None = 0, **kwargs: Any) -> Any:
    ours = SlabSlidingWindowInferer(*args, reduce=reduce, slab_dim=slab_dim, **kwargs)
    return SlidingWindowInferer(*args, **kwargs)(inputs, net), ours(inputs, net)


CASES = {
    "constant": {"roi_size": (16, 20, 12)},
    "gaussian, half overlap": {"roi_size": (16, 20, 12), "mode": "gaussian", "overlap": 0.5},
    "overlap per axis, three at a time": {"roi_size": 16, "sw_batch_size": 3, "overlap": (0.6, 0.1, 0.0)},
    "a roi that takes a whole axis": {"roi_size": (16, -1, 12), "mode": "gaussian"},
    "larger than the image, replicated": {"roi_size": (64, 20, 48), "padding_mode": "replicate"},
    "larger than the image, a value": {"roi_size": 64, "cval": -3.0, "mode": "gaussian"},
    "a weight map kept": {"roi_size": (16, 20, 12), "mode": "gaussian", "cache_roi_weight_map": True},
    "one voxel apart": {"roi_size": (4, 30, 30), "overlap": 0.9, "sw_batch_size": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_monais_bit_by_bit(case: str) -> None:
    naive, ours = both(image(35, 30, 27), network(), to_values(), **CASES[case])
    assert torch.equal(ours, naive)


@given(
    size=st.tuples(*[st.integers(1, 24)] * 3),
    roi=st.tuples(*[st.integers(-1, 14)] * 3),
    overlap=st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 0.7])] * 3),
    mode=st.sampled_from(["constant", "gaussian"]),
    sw_batch_size=st.integers(1, 5),
    batch=st.integers(1, 2),
)
@settings(max_examples=40)
def test_labels_equal_those_of_whole_logits_for_any_size(
    size: Any, roi: Any, overlap: Any, mode: str, sw_batch_size: int, batch: int
) -> None:
    naive, ours = both(
        image(*size, batch=batch), network(), to_labels(), roi, sw_batch_size=sw_batch_size, overlap=overlap, mode=mode
    )
    assert ours.dtype == torch.uint8
    assert torch.equal(ours.long(), naive.argmax(dim=1, keepdim=True))


@given(size=st.tuples(*[st.integers(3, 24)] * 3), slab_dim=st.sampled_from([1, 2, -1, None]))
@settings(max_examples=20)
def test_along_another_axis_only_the_last_bits_differ(size: Any, slab_dim: int | None) -> None:
    naive, ours = both(image(*size), network(), to_values(), 9, slab_dim=slab_dim, overlap=0.4, mode="gaussian")
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=2e-6)


def test_the_result_lies_where_the_input_lay_and_can_be_taken_apart() -> None:
    inputs = image(20, 18, 16, batch=2)
    naive, ours = both(inputs, network(), to_labels(), 12)
    assert isinstance(ours, MetaTensor)
    for mine, theirs in zip(decollate_batch(ours), decollate_batch(naive), strict=True):
        assert mine.shape == (1, 20, 18, 16)
        assert torch.equal(mine.affine, theirs.affine)
        assert mine.meta.keys() == theirs.meta.keys()


def test_a_plain_tensor_stays_one() -> None:
    result = SlabSlidingWindowInferer(8, reduce=to_labels())(torch.randn(1, 1, 9, 9, 9), network())
    assert type(result) is torch.Tensor


def test_a_plane() -> None:
    naive, ours = both(torch.randn(2, 1, 40, 33), network(dims=2), to_values(), (16, 12), overlap=0.5)
    assert torch.equal(ours, naive)


def test_softmax_sigmoid_and_masks_are_those_of_whole_logits() -> None:
    inputs = image(30, 17, 15)
    for reduce, wanted in (
        (to_values("softmax"), lambda logits: logits.softmax(dim=1)),
        (to_values("sigmoid", torch.float16), lambda logits: logits.sigmoid().half()),
        (to_labels("softmax"), lambda logits: logits.softmax(dim=1).argmax(dim=1, keepdim=True).to(torch.uint8)),
        (to_masks("sigmoid", 0.6), lambda logits: (logits.sigmoid() >= 0.6).to(torch.uint8)),
    ):
        naive, ours = both(inputs, network(), reduce, 12, mode="gaussian")
        wanted_values = wanted(naive.as_tensor())
        assert ours.dtype == wanted_values.dtype
        torch.testing.assert_close(
            ours.as_tensor(), wanted_values, rtol=1e-3 if ours.dtype == torch.half else 1e-6, atol=1e-7
        )


def test_more_than_256_classes_have_room() -> None:
    def last_wins(data: torch.Tensor) -> torch.Tensor:
        return torch.arange(300.0).reshape(1, -1, 1, 1, 1).repeat(len(data), 1, *data.shape[2:])

    assert (SlabSlidingWindowInferer(4, reduce=to_labels())(image(5, 5, 5), last_wins) == 299).all()


def test_half_precision_logits_of_autocast_are_added_as_monai_adds_them() -> None:
    net = network()
    naive, ours = both(image(30, 17, 15), lambda data: net(data).half(), to_values(), 12, mode="gaussian", overlap=0.5)
    assert torch.equal(ours, naive)


def test_a_condition_and_coordinates_reach_the_network() -> None:
    inputs, seen = image(20, 9, 9), []

    def net(data: torch.Tensor, coordinates: list[Any], condition: torch.Tensor) -> torch.Tensor:
        seen.append(coordinates[0][2].start)
        return torch.cat([data, data + condition], dim=1)

    kwargs = {"overlap": 0.5, "with_coord": True}
    condition = torch.randn(inputs.shape)
    naive = SlidingWindowInferer(9, **kwargs)(inputs, net, condition=condition)
    starts, seen = list(seen), []
    ours = SlabSlidingWindowInferer(9, reduce=to_values(), **kwargs)(inputs, net, condition=condition)
    assert torch.equal(ours, naive)
    assert seen == starts


def test_settings_and_weight_map_come_from_the_bundles_inferer() -> None:
    configured = SlidingWindowInferer((16, 12, 8), 2, 0.5, mode="gaussian", cache_roi_weight_map=True)
    ours = SlabSlidingWindowInferer.of(configured, to_values())
    inputs = image(20, 18, 16)
    assert ours.roi_weight_map is configured.roi_weight_map
    assert torch.equal(ours(inputs, network()), configured(inputs, network()))


def test_an_inferer_that_does_something_else_is_refused() -> None:
    with pytest.raises(ModelError, match="SliceInferer"):
        SlabSlidingWindowInferer.of(SliceInferer(roi_size=(8, 8), spatial_dim=2), to_labels())


def test_several_outputs_are_refused_with_a_reason() -> None:
    with pytest.raises(ModelError, match="returns tuple and not one tensor"):
        SlabSlidingWindowInferer(8)(image(9, 9, 9), lambda data: (data, data))


def test_maps_of_another_size_are_stitched_by_monai_and_reduced_at_the_end() -> None:
    def coarse(data: torch.Tensor) -> torch.Tensor:
        return torch.cat([data, -data], dim=1)[..., ::2, ::2, ::2]

    inputs = image(16, 16, 16)
    ours = SlabSlidingWindowInferer(8, overlap=0.5, reduce=to_labels())
    naive = SlidingWindowInferer(8, overlap=0.5)(inputs, coarse)
    assert torch.equal(ours(inputs, coarse).long(), naive.argmax(dim=1, keepdim=True))
    assert "differ in size" in ours.remarks[0]


def test_a_network_that_returns_its_input_leaves_the_image_alone() -> None:
    inputs = image(20, 9, 9)
    before = inputs.clone()
    result = SlabSlidingWindowInferer(9, mode="gaussian", reduce=to_values())(inputs, lambda data: data)
    assert torch.equal(inputs, before)
    torch.testing.assert_close(result.as_tensor(), before.as_tensor())


def test_progress_is_told_after_every_batch() -> None:
    told: list[tuple[int, int]] = []
    inferer = SlabSlidingWindowInferer(8, 3, 0.0, on_progress=lambda done, total: told.append((done, total)))
    inferer(image(16, 16, 8), network())
    assert told == [(3, 4), (4, 4)]


class TestOutOfMemory:
    """What happens when memory runs out, by the errors that torch and Python raise."""

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            MemoryError(),
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_fewer_windows_run_at_once_and_the_result_is_the_same(self, error: BaseException) -> None:
        net, sizes = network(), []

        def small(data: torch.Tensor) -> torch.Tensor:
            sizes.append(len(data))
            if len(data) > 2:
                raise error
            return net(data)

        inputs = image(24, 24, 24)
        ours = SlabSlidingWindowInferer(8, 8, reduce=to_labels())
        result = ours(inputs, small)
        naive = SlidingWindowInferer(8, 2)(inputs, net)
        assert sizes[:3] == [8, 4, 2]
        assert set(sizes[3:]) <= {1, 2}
        assert len(ours.remarks) == 2
        assert "2 window(s) at a time instead of 8" in ours.remarks[-1]
        assert torch.equal(result.long(), naive.argmax(dim=1, keepdim=True))

    def test_one_window_that_is_too_much_is_said_so(self) -> None:
        def never(data: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        ours = SlabSlidingWindowInferer(8, 2)
        with pytest.raises(torch.OutOfMemoryError):
            ours(image(9, 9, 9), never)
        assert "1 window(s)" in ours.remarks[0]

    def test_reducing_may_run_out_half_way_and_go_on(self) -> None:
        """The stitching moves to the CPU in the middle of a slab: rows that are finished are not finished twice."""
        inputs, failures = image(40, 9, 9), iter([False, True] + [False] * 100)

        def reduce(values: torch.Tensor) -> torch.Tensor:
            if next(failures):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return values.clone()

        class Stitching(SlabSlidingWindowInferer):
            def _stitch_on_cpu(self, slab: Any) -> bool:
                slab.move(torch.device("cpu"))
                return True

        ours = Stitching(9, 1, 0.5, mode="gaussian", reduce=reduce)(inputs, network())
        naive = SlidingWindowInferer(9, 1, 0.5, mode="gaussian")(inputs, network())
        assert torch.equal(ours, naive)

    def test_an_error_of_the_network_is_not_taken_for_one_of_memory(self) -> None:
        def broken(data: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            SlabSlidingWindowInferer(8, 4)(image(9, 9, 9), broken)


GROWTH = """
import torch
from monai.inferers.inferer import SlidingWindowInferer
from node.infer.reduce import to_labels
from node.infer.sliding import SlabSlidingWindowInferer
from tests.benchmark.many_classes import resident_mb

torch.set_num_threads(1)
network = torch.nn.Conv3d(1, 120, 1).requires_grad_(False)
image, naive = torch.randn(1, 1, 400, 64, 64), SlidingWindowInferer((16, 64, 64), 1, 0.25)
before = resident_mb("VmRSS")
labels = SlabSlidingWindowInferer.of(naive, to_labels("softmax"))(image, network)
ours = resident_mb("VmHWM") - before
same = torch.equal(naive(image, network).softmax(1).argmax(1, keepdim=True).to(torch.uint8), labels)
print(ours, resident_mb("VmHWM") - before, int(same))
"""


def test_many_classes_stay_within_one_slab() -> None:
    """120 classes of 400 rows: a slab of 16 rows is 31 MB, the whole 786 MB. Measured in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", GROWTH]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    ours_mb, naive_mb, same = map(int, done.stdout.split())
    assert same
    assert naive_mb > 786  # the measurement sees what it is meant to see
    assert ours_mb < 250
