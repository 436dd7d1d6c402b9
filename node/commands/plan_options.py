"""The options of `radnode plan`, apart from the command: the parser of every command must not load numpy."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

STAGES = ("receive", "route", "deliver", "database", "job")  # what `--time` may name beside the models

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(r"(?P<name>[\w.-]+)=(?P<fixed>\d+(?:\.\d+)?)(?:\+(?P<image>\d+(?:\.\d+)?)/image)?", re.ASCII)


def add_options(command: ArgumentParser) -> None:
    """The options of the command."""
    command.add_argument("--studies-per-day", type=_positive, required=True, metavar="N")
    command.add_argument("--images-per-study", type=_positive, required=True, metavar="M", help="on average")
    command.add_argument(
        "--model", type=_model, action="append", required=True, metavar="NAME[=SHARE]",
        help="a model that runs on every study, or on this share (0 to 1) of them; may be given several times",
    )  # fmt: skip
    command.add_argument(
        "--bench", type=Path, action="append", default=[], metavar="FILE",
        help="what `radnode models bench MODEL STUDY --json` printed; one for each model",
    )  # fmt: skip
    command.add_argument(
        "--study", type=Path, metavar="PATH",
        help="the folder of one study: models without --bench and --time are measured on it here",
    )  # fmt: skip
    command.add_argument("--device", default="auto", help="to measure on: auto (default), cpu, cuda, cuda:1")
    command.add_argument(
        "--time", type=_time, action="append", default=[], metavar="NAME=SECONDS[+SECONDS/image]",
        help=f"what one study takes of a model, or of a stage: {', '.join(STAGES)}",
    )  # fmt: skip
    command.add_argument("--goal", type=_duration, default=60.0, metavar="TIME", help="of waiting (default 60s)")
    command.add_argument("--slots", type=_whole, metavar="K", help="plan with so many worker slots")
    command.add_argument("--receivers", type=_whole, metavar="K", help="plan with so many receivers")
    command.add_argument(
        "--no-overlap", dest="overlap", action="store_false",
        help="a slot does not read the next study and report the last one while the model runs",
    )  # fmt: skip
    command.add_argument(
        "--hours", type=_hours, metavar="A-B",
        help="nine in ten studies come evenly between these hours, such as 7-19; default: a hospital's day",
    )  # fmt: skip
    command.add_argument("--image-size", type=_positive, default=525_000.0, metavar="BYTES", help="default 525000")
    command.add_argument(
        "--result-size", type=_positive, default=1_000_000.0, metavar="BYTES", help="of a job's (default 1000000)"
    )
    command.add_argument(
        "--keep", type=_duration, default=7 * 86400.0, metavar="TIME", help="keep.studies (default 7d)"
    )
    command.add_argument("--days", type=_whole, metavar="D", help="to simulate (default: 7, fewer when they are busy)")
    command.add_argument("--seed", type=_whole, default=1, metavar="N", help="of the random numbers (default 1)")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e12:
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip(), re.ASCII)
    if match is None or float(match[1]) == 0:
        raise ArgumentTypeError(f"{text!r} is not a time above zero with its unit, such as 30s, 10m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _model(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    value = _positive(share) if share else 1.0
    if not name or value > 1:
        raise ArgumentTypeError(f"{text!r} is not a model, or a model and its share of the studies, such as lungs=0.4")
    return name, value


def _time(text: str) -> tuple[str, float, float]:
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ArgumentTypeError(
            f"{text!r} is not NAME=SECONDS or NAME=SECONDS+SECONDS/image, such as lungs=2+0.02/image"
        )
    return match["name"], float(match["fixed"]), float(match["image"] or 0)


def _hours(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,2})-(\d{1,2})", text.strip(), re.ASCII)
    if match is None or not 0 <= int(match[1]) < int(match[2]) <= 24:
        raise ArgumentTypeError(f"{text!r} are not hours of a day, such as 7-19")
    return int(match[1]), int(match[2])
