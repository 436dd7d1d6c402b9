"""The standardized uptake value by body weight, from the attributes of a PET series.

The rules are those of the QIBA FDG-PET/CT profile's pseudo-code ("vendor-neutral happy path"), on the attributes of
PS3.3 C.8.9.1, C.8.9.2 and C.8.9.4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, time, timedelta

import numpy as np
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, DT, TM

_PHILIPS = "Philips PET Private Group"  # owner of (7053,xx00), the SUV factor, and (7053,xx09), the activity factor

# Less is in MBq, as nuclear medicine images have this attribute (PS3.3 C.8.9.2, note).
_LEAST_DOSE_BQ = 1e5
_HEAD_START = timedelta(hours=1)  # that a dynamic scan may begin before the injection
_HALF_LIVES = 10  # after which there is nothing to be seen
_SHORT_LIVED_S = 6 * 3600.0  # F-18 and what decays faster is imaged on the day of its injection


def suv_factor(headers: Sequence[Dataset]) -> float | None:
    """What the rescaled values of a series are multiplied by to be SUV by body weight, in g/ml.

    `headers` are all instances of the series. None where an attribute is missing, where attenuation or decay is not
    corrected for, or where the decay correction has no time that is known here.
    """
    header = headers[0]
    try:
        match header.get("Units"):
            case "BQML":
                return _from_activity(headers)
            case "CNTS":
                if factor := _philips(header, 0x00):
                    return factor
                activity, factor = _philips(header, 0x09), _from_activity(headers)
                return activity * factor if activity and factor else None
    except (TypeError, ValueError, OverflowError, LookupError, AttributeError):  # a value that is no number or no time
        return None
    return None


def _from_activity(headers: Sequence[Dataset]) -> float | None:
    header = headers[0]
    corrected = header.get("CorrectedImage") or ()
    if not {"ATTN", "DECY"} <= set([corrected] if isinstance(corrected, str) else corrected):
        return None
    tracer = header.RadiopharmaceuticalInformationSequence[0]
    dose_bq, weight_kg = float(tracer.RadionuclideTotalDose), float(header.PatientWeight)
    if dose_bq < _LEAST_DOSE_BQ:
        return None
    match header.get("DecayCorrection"):
        case "ADMIN":
            decay = 1.0
        case "START":
            half_life_s = float(tracer.RadionuclideHalfLife)
            elapsed_s = _seconds_since_injection(
                tracer, _scan_start(headers), str(header.get("TimezoneOffsetFromUTC") or "").strip(), half_life_s
            )
            decay = 2.0 ** (-elapsed_s / half_life_s) if half_life_s > 0 else np.nan
        case _:
            return None
    factor = weight_kg * 1000 / (dose_bq * decay) if dose_bq > 0 and decay > 0 else np.nan
    return factor if np.isfinite(factor) and factor > 0 else None


def _scan_start(headers: Sequence[Dataset]) -> datetime:
    """When decay is corrected to: the series' time, unless that is when it was processed later.

    A series whose time is after its first image's was made anew; then its earliest image counts.
    """
    first = min(_moment(header, "Acquisition") for header in headers)
    series = _moment(headers[0], "Series")
    return series if series <= first else first


def _moment(header: Dataset, what: str) -> datetime:
    return _joined(str(header[f"{what}Date"].value), str(header[f"{what}Time"].value))


def _joined(date: str, time: str) -> datetime:
    day, clock = DA(date), TM(time)
    if day is None or clock is None:
        raise ValueError("no date or no time")
    return datetime.combine(day, clock)


def _seconds_since_injection(tracer: Dataset, scan: datetime, offset: str, half_life_s: float) -> float:
    """From the tracer's injection to the scan; a little less than zero where the scan was running already.

    The date counts only where the tracer was still there at the scan: de-identification moves the dates of scans and
    forgets this one. Without a date the injection was at such an hour next to the scan; `ValueError` for a tracer that
    lasts for days, of which the hour says nothing. All times of a data set share one offset from UTC, so they are read
    as the clock showed them; a date and time that states another one is brought to `offset` (PS3.3 C.12.1.1.8).
    """
    moment = _injection(tracer, offset)
    if isinstance(moment, datetime):
        if -_HEAD_START <= scan - moment <= max(timedelta(days=1), timedelta(seconds=_HALF_LIVES * half_life_s)):
            return (scan - moment).total_seconds()
        moment = moment.time()
    if half_life_s > _SHORT_LIVED_S:
        raise ValueError("no date of injection")
    elapsed = (scan - datetime.combine(scan.date(), moment)) % timedelta(days=1)
    return (elapsed if elapsed < timedelta(days=1) - _HEAD_START else elapsed - timedelta(days=1)).total_seconds()


def _injection(tracer: Dataset, offset: str) -> datetime | time:
    text = str(tracer.get("RadiopharmaceuticalStartDateTime") or "").strip()
    parsed = DT(text) if re.match(r"\d{12}", text) else None  # a date alone would be read as midnight
    if parsed is not None:
        moment = datetime.fromisoformat(parsed.isoformat())
        if moment.tzinfo is not None and re.fullmatch(r"[+-]\d{4}", offset):
            moment = moment.astimezone(datetime.strptime(offset, "%z").tzinfo)
        return moment.replace(tzinfo=None)
    clock = TM(str(tracer.RadiopharmaceuticalStartTime))
    if clock is None:
        raise ValueError("no time of injection")
    return clock


def _philips(header: Dataset, element: int) -> float | None:
    """A factor of Philips' private block; None where it's absent or zero, which says that it does not hold."""
    try:
        value = header.private_block(0x7053, _PHILIPS)[element].value
    except KeyError:
        return None
    if isinstance(value, bytes):  # of an implicit VR file, where private elements have no known VR
        value = value.decode("ascii").strip("\0 ")
    factor = float(value)
    return factor if np.isfinite(factor) and factor > 0 else None
