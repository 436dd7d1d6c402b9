"""Which of the volumes of a study a model takes, and why not the others."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydicom.dataset import Dataset

from node.dicom.assembly import Assembly, VolumePlan
from node.errors import InputRefused
from node.infer.manifest import Input, Limits, Rank


@dataclass(frozen=True)
class Choice:
    """The volume that was chosen, and a sentence for each that was not."""

    plan: VolumePlan
    left_out: tuple[str, ...]


def select_input(assembly: Assembly, wanted: Input) -> Choice:
    """The best volume by the input's rank among those that satisfy its conditions and limits.

    Ties are broken by series UID. `InputRefused` says in one sentence why each series was left out.
    """
    left_out = [f"series {_describe_series(refusal.series_uid)}: {refusal.sentence}" for refusal in assembly.refusals]
    candidates: list[VolumePlan] = []
    for plan in assembly.volumes:
        if reason := _unfit(plan, wanted):
            left_out.append(f"series {_describe(plan)}: {reason}")
        else:
            candidates.append(plan)
    if not candidates:
        raise InputRefused("not applicable: " + ("; ".join(left_out) or "there is no image"))
    best = min(candidates, key=lambda plan: (*(_rank(plan, rule) for rule in wanted.rank), plan.series_uid, plan.name))
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


def _unfit(plan: VolumePlan, wanted: Input) -> str:
    """Why a volume cannot be the input; "" when it can."""
    failed = [str(verdict) for verdict in wanted.when.explain(plan.header) if not verdict.holds]
    return "; ".join(failed) or _beyond_limits(plan, wanted.limits)


def _beyond_limits(plan: VolumePlan, limits: Limits) -> str:
    slices = plan.grid.shape[0]
    spacing_mm = max(plan.grid.spacing_mm)
    coverage_mm = slices * plan.grid.spacing_mm[0]
    age_years = _age_years(plan.header)
    if slices < limits.slices_min:
        return f"it has {slices} slices, the model needs {limits.slices_min}"
    if limits.spacing_max_mm is not None and spacing_mm > limits.spacing_max_mm:
        return f"its voxels are {spacing_mm:.2f} mm apart, the model takes up to {limits.spacing_max_mm:g} mm"
    if limits.coverage_min_mm is not None and coverage_mm < limits.coverage_min_mm:
        return f"it covers {coverage_mm:.0f} mm, the model needs {limits.coverage_min_mm:g} mm"
    if limits.age_min_years is not None and age_years is not None and age_years < limits.age_min_years:
        return f"the patient is younger than {limits.age_min_years:g} years"
    if limits.age_max_years is not None and age_years is not None and age_years > limits.age_max_years:
        return f"the patient is older than {limits.age_max_years:g} years"
    return ""


def _rank(plan: VolumePlan, rule: Rank) -> float | str:
    """A key by which the better volume comes first."""
    match rule:
        case Rank.THINNEST:
            return round(plan.grid.spacing_mm[0], 2)
        case Rank.SOFTEST_KERNEL:
            return kernel_sharpness(plan.header)
        case Rank.MOST_SLICES:
            return -plan.grid.shape[0]
        case Rank.NEWEST:
            return -_acquired(plan.header)


def _acquired(header: Dataset) -> float:
    """Date and time of acquisition as one number that grows with them; 0 where they are not known."""
    date = str(header.get("AcquisitionDate") or header.get("SeriesDate") or "")
    time = str(header.get("AcquisitionTime") or header.get("SeriesTime") or "").strip()
    match = re.fullmatch(r"(\d{8})(\d{0,6})(\.\d*)?", date + time)
    # Minutes, seconds and fraction may be left out (PS3.5 6.2, VR TM).
    return float(f"{match[1]}{match[2]:0<6}{match[3] or ''}") if match else 0.0


def _age_years(header: Dataset) -> float | None:
    match = re.fullmatch(r"(\d{1,3})([DWMY])", str(header.get("PatientAge", "") or "").strip())
    if match is None:
        return None
    return int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}[match[2]]


def _describe(plan: VolumePlan) -> str:
    text = str(plan.header.get("SeriesDescription", "") or "").strip()[:64]
    name = "".join(character for character in text if character.isprintable())  # it goes into logs and terminals
    return " ".join(part for part in (name or _describe_series(plan.series_uid), plan.name) if part)


def _describe_series(uid: str) -> str:
    return f"...{uid[-12:]}"
