"""Volumes of one series told apart: first by their geometry, then, where slices share a place, by what the images are.

The smallest set of traits counts that leaves every volume one slice per place and all volumes equally many slices; of
sets of one size, the first in the order of `node.dicom.traits`. Nothing is guessed: slices that no set tells apart are
refused, because a volume that mixes echoes, phases or breath-holds looks right and is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from node.dicom.candidates import Slice
from node.dicom.identity import is_uid
from node.dicom.stack import SAME_PLACE_MM, heights_mm, is_even
from node.dicom.traits import Trait, Value, traits_of

ORIENTATION_TOLERANCE = 1e-3  # of a direction cosine
GEOMETRIES_MAX = 256  # orientations and sizes in one series; a radial acquisition has a few dozen
TRAITS_MAX = 4  # as many together; more were never seen to be needed

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Slices that belong together."""

    name: str  # what tells them from the series' others; "" where there are none
    slices: tuple[Slice, ...]
    refused: str = ""  # why they are no volume


def tell_apart(slices: Sequence[Slice]) -> list[Group]:
    """The slices of one series as groups of one size, orientation and frame of reference, each place taken once."""
    shapes = by_geometry(slices)
    if not shapes:
        return [Group("", tuple(slices), f"its slices have more than {GEOMETRIES_MAX} orientations or sizes")]
    names = _stack_names(shapes)
    groups: list[Group] = []
    for prefix, shape in zip(names, shapes, strict=True):
        for group in _by_traits(shape):
            # As it is split here, so it would be if its instances came alone: a job has only those.
            for part in [group] if group.refused else _interleaved(group.slices) or [Group("", group.slices)]:
                name = ", ".join(dict.fromkeys(each for each in (prefix, group.name, part.name) if each))
                groups.append(Group(name, part.slices, group.refused))
    return groups


def by_geometry(slices: Sequence[Slice]) -> list[tuple[Slice, ...]]:
    """The slices of each size, orientation and frame of reference, in the order of their firsts.

    An empty list where there are more than `GEOMETRIES_MAX`: the work grows with their number times that of the slices.
    """
    orientations = np.array([slice_.orientation for slice_ in slices]).reshape(-1, 6)
    frames = [(slice_.size, str(slice_.header.get("FrameOfReferenceUID", ""))) for slice_ in slices]
    numbers_of = {frame: number for number, frame in enumerate(dict.fromkeys(frames))}
    codes = np.array([numbers_of[frame] for frame in frames])
    left = np.arange(len(slices))
    groups: list[tuple[Slice, ...]] = []
    while len(left):
        if len(groups) == GEOMETRIES_MAX:
            return []
        near = (np.abs(orientations[left] - orientations[left[0]]) <= ORIENTATION_TOLERANCE).all(axis=1)
        near &= codes[left] == codes[left[0]]
        groups.append(tuple(slices[index] for index in left[near].tolist()))
        left = left[~near]
    return groups


def _stack_names(shapes: list[tuple[Slice, ...]]) -> list[str]:
    """By StackID where each group is one stack of its own, else by number."""
    if len(shapes) == 1:
        return [""]
    stacks = [{str(slice_.header.get("StackID") or "") for slice_ in shape} for shape in shapes]
    names = [next(iter(stack)) for stack in stacks if len(stack) == 1]
    if len(set(names)) == len(shapes) and all(name.isalnum() for name in names):
        return [f"stack {name}" for name in names]
    return [f"volume {number}" for number in range(1, len(shapes) + 1)]


def _by_traits(slices: tuple[Slice, ...]) -> list[Group]:
    heights = heights_mm(slices)
    places = _places(heights)
    count = int(places.max()) + 1
    if count == len(slices):
        return [Group("", slices)]
    if count == 1:
        return [Group("", slices, f"all {len(slices)} slices lie at one place, {heights[0]:.2f} mm along the normal")]
    traits = list(_telling(slices, places))
    for chosen in _sets(traits):
        labels = _labels(chosen)
        if _is_unique(labels, places) and len(set(np.bincount(labels))) == 1:
            return _groups(slices, chosen, labels)
    for chosen in _sets([trait for trait in traits if trait.trait.says_what]):
        labels = _labels(chosen)
        if _is_unique(labels, places):
            sizes = np.bincount(labels)
            short = np.flatnonzero(sizes < count)
            if len(sizes) > 2 and len(short) == 1:  # a series in time that was stopped, or a slice that was lost
                return _groups(slices, chosen, labels, count)
            if len(sizes) == 2 and 2 * sizes.min() >= count:  # two of different extents; each must be regular
                return _groups(slices, chosen, labels)
    return [Group("", slices, _doubled(slices, heights, places))]


# -- Traits of these slices ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Telling:
    """A trait with the values that these slices have of it."""

    trait: Trait
    values: list[Value | None]
    codes: Codes  # per slice, ascending with the value


def _telling(slices: Sequence[Slice], places: Codes) -> Iterator[_Telling]:
    """The traits in which these slices differ, and in more than the place."""
    for trait in traits_of(list(slices)):
        values = [trait.value(slice_) for slice_ in slices]
        distinct = sorted({value for value in values if value is not None}, key=_sort_key)
        ranks = {value: rank for rank, value in enumerate(distinct, 1)}
        codes = times = np.array([0 if value is None else ranks[value] for value in values], np.int64)
        if trait.by_place:
            codes = _rank_by_place(codes, places)
            if trait.in_turn and not _is_in_turn(codes, times):
                continue
        if 1 < len(np.unique(codes)) <= len(slices) // 2:
            yield _Telling(trait, values, codes)


def _sort_key(value: Value) -> tuple[str, Value]:
    return type(value).__name__, value


def _rank_by_place(codes: Codes, places: Codes) -> Codes:
    """The rank of each slice's value among those of its place; equal values have one rank."""
    order = np.lexsort((codes, places))
    new_place = np.diff(places[order], prepend=-1) != 0
    new_value = new_place | (np.diff(codes[order], prepend=-1) != 0)
    running = np.cumsum(new_value)
    ranks = np.empty_like(codes)
    ranks[order] = running - np.maximum.accumulate(np.where(new_place, running, 0))
    return ranks


def _is_in_turn(codes: Codes, times: Codes) -> bool:
    """Whether all of one volume was made before any of the next."""
    spans = [times[codes == code] for code in np.unique(codes)]
    return all(before.max() <= after.min() for before, after in pairwise(spans))


def _sets(traits: list[_Telling]) -> Iterator[tuple[_Telling, ...]]:
    for size in range(1, TRAITS_MAX + 1):
        yield from combinations(traits, size)


def _labels(chosen: Sequence[_Telling]) -> Codes:
    """A number per slice, the same for slices with the same values; ascending with the values."""
    labels = np.zeros(len(chosen[0].codes), np.int64)
    for telling in chosen:
        labels = labels * (int(telling.codes.max()) + 1) + telling.codes
        labels = np.unique(labels, return_inverse=True)[1].reshape(-1)  # stays small however many traits
    return labels


def _is_unique(labels: Codes, places: Codes) -> bool:
    taken = labels * (int(places.max()) + 1) + places
    return len(np.unique(taken)) == len(taken)


# -- Groups --------------------------------------------------------------------------------------------------------


def _groups(slices: Sequence[Slice], chosen: Sequence[_Telling], labels: Codes, full: int = 0) -> list[Group]:
    """The groups of `labels`, named; one of less than `full` slices is refused."""
    members = [np.flatnonzero(labels == label).tolist() for label in range(int(labels.max()) + 1)]
    names = _names(chosen, members)
    return [
        Group(
            name,
            tuple(slices[index] for index in indices),
            f"it has {len(indices)} of the {full} slices that the series' other volumes have"
            if len(indices) < full
            else "",
        )
        for name, indices in zip(names, members, strict=True)
    ]


def _names(chosen: Sequence[_Telling], members: list[list[int]]) -> list[str]:
    parts: list[list[str]] = [[] for _ in members]
    for telling in chosen:
        values = [telling.values[indices[0]] for indices in members]
        ranks = {code: rank for rank, code in enumerate(sorted({int(code) for code in telling.codes if code}), 1)}
        if telling.trait.by_place:
            ranks = {code: code + 1 for code in map(int, np.unique(telling.codes))}
        shared = set.intersection(*(set(value) if isinstance(value, tuple) else set() for value in values))
        for part, value, indices in zip(parts, values, members, strict=True):
            if value is None:
                continue
            own = value
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                own = tuple(str(item) for item in value if item not in shared)  # what all have tells nothing
            if name := telling.trait.name(own, ranks.get(int(telling.codes[indices[0]]), 0)).strip():
                part.append(name)
    names = [" ".join(part) for part in parts]
    if len(set(names)) < len(names) or not all(names):
        names = [f"volume {number} {name}".strip() for number, name in enumerate(names, 1)]
    return names


def _interleaved(slices: tuple[Slice, ...]) -> list[Group]:
    """Volumes whose slices lie between each other's: together uneven, each even by itself. Else nothing."""
    heights = heights_mm(slices)
    order = np.argsort(heights, kind="stable")
    if len(slices) < 6 or is_even(heights[order]):
        return []
    for telling in _telling(slices, np.arange(len(slices), dtype=np.int64)):
        labels = _labels([telling])
        parts = [np.sort(heights[labels == label]) for label in range(int(labels.max()) + 1)]
        if not telling.trait.says_what or min(map(len, parts)) < 3 or not all(map(is_even, parts)):
            continue
        ends = sorted((part[0], part[-1]) for part in parts)
        if any(below[1] > above[0] for below, above in pairwise(ends)):
            return _groups(slices, [telling], labels)
    return []


def _places(heights: NDArray[np.float64]) -> Codes:
    """A number per slice, the same for slices at the same place along the normal."""
    order = np.argsort(heights, kind="stable")
    places = np.empty(len(heights), np.int64)
    places[order] = np.cumsum(np.diff(heights[order], prepend=heights[order[0]]) >= SAME_PLACE_MM)
    return places


def _doubled(slices: Sequence[Slice], heights: NDArray[np.float64], places: Codes) -> str:
    counts = np.bincount(places)
    first = int(np.flatnonzero(counts > 1)[0])
    at = np.flatnonzero(places == first).tolist()
    named = ", ".join(_shown(slices[index]) for index in at[:3]) + (" and others" if len(at) > 3 else "")
    uids = {(slices[index].instance.SOPInstanceUID, slices[index].frame) for index in at}
    what = "the same instance twice" if len(uids) < len(at) else "and no attribute tells them apart"
    return (
        f"{len(slices) - len(counts)} of {len(slices)} slices lie where another one lies, {what}: "
        f"at {heights[at[0]]:.2f} mm along the normal {named}"
    )


def _shown(slice_: Slice) -> str:
    frame = f" frame {slice_.frame}" if slice_.frame is not None else ""
    uid = str(slice_.instance.SOPInstanceUID)
    return f"{uid if is_uid(uid) else 'an instance whose UID is none'}{frame}"  # a damaged UID may be any text
