"""What a job calls its inputs: instances by their UIDs, and frames where not all of an instance are meant.

One multi-frame object can hold several volumes. `UID` stands for all frames of an instance, `UID#1-24,30` for those
(1-based, PS3.5 has no '#' in a UID). The names decide the job's key, and with it every UID of its results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # lists of jobs name instances too, and do not wait for what reads images
    from node.dicom.assembly import Assembly, InputPlan

_FRAMES = "#"


def name_plan(plan: InputPlan) -> list[str]:
    """The names of the instances or frames that a volume or image is made of, sorted, one per instance."""
    from node.dicom.frames import frame_count

    counts = {str(header.SOPInstanceUID): frame_count(header) for header in plan.headers}
    used: dict[str, set[int]] = {}
    for ref in plan.slices:
        used.setdefault(ref.sop_instance_uid, set()).add(ref.frame or 1)
    return sorted(
        uid if len(frames) == counts[uid] else f"{uid}{_FRAMES}{_ranges(sorted(frames))}"
        for uid, frames in used.items()
    )


def instances_of(names: Iterable[str]) -> list[str]:
    """The SOP Instance UIDs in names, each once, sorted."""
    return sorted({name.partition(_FRAMES)[0] for name in names})


def narrow(assembly: Assembly, names: Sequence[str]) -> Assembly:
    """The volumes and images of `assembly` that have these names; its refusals stay.

    Jobs of earlier versions name no frames: then all volumes of exactly those instances stay.
    """
    wanted = sorted(names)

    def matches(plan: InputPlan) -> bool:
        own = name_plan(plan)
        return own == wanted or instances_of(own) == wanted

    return replace(
        assembly,
        volumes=tuple(plan for plan in assembly.volumes if matches(plan)),
        images=tuple(plan for plan in assembly.images if matches(plan)),
    )


def _ranges(frames: Sequence[int]) -> str:
    """`1-3,7` of 1, 2, 3 and 7."""
    runs = [
        [frame for _, frame in run] for _, run in groupby(enumerate(frames), lambda numbered: numbered[1] - numbered[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
