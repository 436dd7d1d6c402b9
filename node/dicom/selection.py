"""Which of the volumes or images of a study a model takes, and why not the others."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from node.dicom.assembly import Assembly, ImagePlan, InputPlan, VolumePlan, shape_of
from node.errors import InputRefused
from node.infer.manifest import Input, Limits, Rank

SENTENCES_MAX = 3  # about volumes of one series that are left out for one reason


@dataclass(frozen=True)
class Choice:
    """The volume or image that was chosen, and a sentence for each that could not be."""

    plan: InputPlan
    left_out: tuple[str, ...]


def select_input(assembly: Assembly, wanted: Input) -> Choice:
    """The best volume (or image, as `wanted.kind` says) by the input's rank among those that satisfy it.

    Ties are broken by series UID, then by the volume's name; among images the newest comes first, then the first by
    instance UID. Conditions are judged on the plan's header: that of the middle slice, a frame's flattened.
    `InputRefused` says in one sentence why each series was left out.
    """
    left_out = [f"series {_describe_series(refusal.series_uid)}: {refusal.sentence}" for refusal in assembly.refusals]
    plans: tuple[InputPlan, ...] = assembly.volumes if wanted.kind == "volume" else assembly.images
    others: tuple[InputPlan, ...] = assembly.images if wanted.kind == "volume" else assembly.volumes
    other = "it is a planar image" if wanted.kind == "volume" else "it is a volume"
    candidates: list[InputPlan] = []
    unfit: dict[tuple[str, str], list[InputPlan]] = {}
    for plan in plans:
        if reason := _unfit(plan, wanted):
            unfit.setdefault((plan.series_uid, reason), []).append(plan)
        else:
            candidates.append(plan)
    for (_, reason), members in unfit.items():
        if len(members) > SENTENCES_MAX:  # a series in time has hundreds of volumes
            left_out.append(f"series {_describe_header(members[0])} ({len(members)} {wanted.kind}s): {reason}")
        else:
            left_out += (f"series {_describe(plan)}: {reason}" for plan in members)
    left_out += dict.fromkeys(f"series {_describe_header(plan)}: {other}" for plan in others)  # once per series
    if not candidates:
        raise InputRefused("not applicable: " + ("; ".join(left_out) or "there is no image"))
    best = min(candidates, key=lambda plan: (*(_rank(plan, rule) for rule in wanted.rank), *_tie(plan)))
    return Choice(best, tuple(left_out))


def kernel_sharpness(header: Dataset) -> float:
    """How sharp a CT convolution kernel is, from soft (0) to sharp (100); 50 where its name says nothing known.

    Siemens numbers its kernels by sharpness (B40f, Br64, I31f); GE, Philips and Canon use names and letters.
    """
    value = header.get("ConvolutionKernel")
    name = str(value[0] if isinstance(value, list | tuple) or hasattr(value, "append") else value or "").strip().upper()
    if siemens := re.fullmatch(r"[ABHJUISTQDCR][A-Z]?(\d{2})[A-Z]?(?:[\\^/ ].*)?", name):
        return float(siemens[1])
    if canon := re.fullmatch(r"FC(\d{2}).*", name):
        number = int(canon[1])
        return 80.0 if number >= 30 and number not in range(40, 50) else 20.0 + number
    return _KERNELS.get(name, 50.0)


_KERNELS = {
    # GE
    "SOFT": 25.0, "STANDARD": 35.0, "DETAIL": 50.0, "CHEST": 50.0, "LUNG": 70.0, "BONE": 75.0,
    "BONEPLUS": 80.0, "EDGE": 90.0,
    # Philips
    "A": 25.0, "B": 35.0, "C": 45.0, "D": 60.0, "E": 75.0, "L": 65.0, "YA": 65.0, "YB": 70.0, "YC": 75.0, "UB": 35.0,
}  # fmt: skip


def _unfit(plan: InputPlan, wanted: Input) -> str:
    """Why a volume or image cannot be the input; "" when it can."""
    failed = [str(verdict) for verdict in wanted.when.explain(plan.header) if not verdict.holds]
    return "; ".join(failed) or _outside(plan, wanted.limits) or _beyond_limits(plan, wanted.limits)


def _outside(plan: InputPlan, limits: Limits) -> str:
    """Which limit of size the voxels break; an image has no size in the patient, and one frame at least."""
    slices = shape_of(plan)[0]
    what = "slices" if isinstance(plan, VolumePlan) else "frames"
    if slices < limits.slices_min:
        return f"it has {slices} {what}, the model needs {limits.slices_min}"
    if isinstance(plan, ImagePlan):
        return ""
    spacing_mm = max(*plan.grid.spacing_mm, _largest_step_mm(plan))
    if limits.spacing_max_mm is not None and spacing_mm > limits.spacing_max_mm:
        return f"its voxels are {spacing_mm:.2f} mm apart, the model takes up to {limits.spacing_max_mm:g} mm"
    coverage_mm = slices * _step_mm(plan)
    if limits.coverage_min_mm is not None and coverage_mm < limits.coverage_min_mm:
        return f"it covers {coverage_mm:.0f} mm, the model needs {limits.coverage_min_mm:g} mm"
    return ""


def _beyond_limits(plan: InputPlan, limits: Limits) -> str:
    age_years = _age_years(plan.header)
    if limits.age_min_years is not None and age_years is not None and age_years < limits.age_min_years:
        return f"the patient is younger than {limits.age_min_years:g} years"
    if limits.age_max_years is not None and age_years is not None and age_years > limits.age_max_years:
        return f"the patient is older than {limits.age_max_years:g} years"
    if limits.contrast is not None and has_contrast(plan.header) != limits.contrast:
        return (
            "no contrast agent is named, the model needs one"
            if limits.contrast
            else "a contrast agent was given, the model takes none"
        )
    return ""


def has_contrast(header: Dataset) -> bool:
    """Whether the header names a contrast agent (PS3.3 C.7.6.4, C.7.6.4b) that was given in this image."""
    # An enhanced frame that was taken before the agent says so (PS3.3 C.7.6.16.2.12).
    if str(header.get("ContrastBolusAgentAdministered") or "").upper() == "NO":
        return False
    agent = header.get("ContrastBolusAgent")
    if agent is not None and str(agent).strip().upper() not in ("", "NONE", "NO"):
        return True
    agents = header.get("ContrastBolusAgentSequence")
    return isinstance(agents, Sequence) and len(agents) > 0


def _step_mm(plan: VolumePlan) -> float:
    """The mean distance of slices along their normal; less than between voxels where they are sheared."""
    columns = plan.grid.affine_lps[:3, :3]
    return float(plan.grid.voxel_volume_mm3 / np.prod(np.linalg.norm(columns[:, :2], axis=0)))


def _largest_step_mm(plan: VolumePlan) -> float:
    if plan.positions_lps is None:
        return 0.0
    return float(np.linalg.norm(np.diff(plan.positions_lps, axis=0), axis=1).max())


def _rank(plan: InputPlan, rule: Rank) -> float:
    """A key by which the better volume comes first. Of two images with one frame each, neither is the thinner."""
    match rule:
        case Rank.THINNEST:
            return round(_step_mm(plan), 2) if isinstance(plan, VolumePlan) else 0.0
        case Rank.SOFTEST_KERNEL:
            return kernel_sharpness(plan.header)
        case Rank.MOST_SLICES:
            return -len(plan.slices)
        case Rank.NEWEST:
            return -_acquired(plan.header)


def _tie(plan: InputPlan) -> tuple[float | str, ...]:
    """What decides where the ranks do not."""
    if isinstance(plan, ImagePlan):
        return -_acquired(plan.header), plan.frames[0].sop_instance_uid
    return 0.0, plan.series_uid, *_natural(plan.name)


def _natural(name: str) -> tuple[str, ...]:
    """A key that sorts "echo 10" after "echo 9"."""
    return tuple(part.zfill(12) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _acquired(header: Dataset) -> float:
    """Date and time of acquisition as one number that grows with them; 0 where they are not known."""
    date = str(header.get("AcquisitionDate") or header.get("SeriesDate") or header.get("ContentDate") or "")
    time = str(header.get("AcquisitionTime") or header.get("SeriesTime") or header.get("ContentTime") or "").strip()
    match = re.fullmatch(r"(\d{8})(\d{0,6})(\.\d*)?", date + time)
    # Minutes, seconds and fraction may be left out (PS3.5 6.2, VR TM).
    return float(f"{match[1]}{match[2]:0<6}{match[3] or ''}") if match else 0.0


def _age_years(header: Dataset) -> float | None:
    match = re.fullmatch(r"(\d{1,3})([DWMY])", str(header.get("PatientAge", "") or "").strip())
    if match is None:
        return None
    return int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}[match[2]]


def _describe(plan: InputPlan) -> str:
    return " ".join(part for part in (_describe_header(plan), plan.name) if part)


def _describe_header(plan: InputPlan) -> str:
    text = str(plan.header.get("SeriesDescription", "") or "").strip()[:64]
    name = "".join(character for character in text if character.isprintable())  # it goes into logs and terminals
    return name or _describe_series(plan.series_uid)


def _describe_series(uid: str) -> str:
    return f"...{uid[-12:]}"
