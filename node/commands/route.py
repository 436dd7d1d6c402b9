"""`radnode route explain`: why each series of a study did or did not match each route."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from pydicom.dataset import Dataset

from node.archive.open import open_archive
from node.commands.output import clean, print_json
from node.config import find_config, load_config
from node.errors import InputRefused
from node.infer.shelf import PackageShelf
from node.route import Decision, decide, read_headers


def explain(options: Namespace) -> int:
    """Explain the routes on a folder, or on a study of the archive."""
    config = load_config(find_config(options.config))
    if (options.path is None) == (options.study is None):
        raise InputRefused("say either a folder or --study UID")
    if options.study:
        archive = open_archive(config)
        studies = {options.study: read_headers(archive, archive.study(options.study))}
    else:
        from node.commands.run import read_studies

        studies = {uid: _by_series(headers) for uid, headers in read_studies(options.path).items()}
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    decisions = {uid: decide(series, config.routes, shelf.look_up) for uid, series in studies.items()}
    if options.json:
        print_json([_as_document(uid, decision) for uid, decision in decisions.items()])
    else:
        for uid, decision in decisions.items():
            _print(uid, decision)
    return 0


def _by_series(headers: dict[Path, Dataset]) -> dict[str, dict[Path, Dataset]]:
    series: dict[str, dict[Path, Dataset]] = {}
    for path, header in headers.items():
        series.setdefault(str(header.get("SeriesInstanceUID", "")), {})[path] = header
    return dict(sorted(series.items()))


def _as_document(uid: str, decision: Decision) -> dict[str, object]:
    return {
        "study": uid,
        "series": [
            {
                "route": verdict.route,
                "series": verdict.series_uid,
                "description": verdict.description,
                "matches": verdict.matches,
                "conditions": [{"holds": condition.holds, "says": str(condition)} for condition in verdict.verdicts],
            }
            for verdict in decision.series
        ],
        "jobs": [
            {
                "route": job.route,
                "model": job.model,
                "instances": sum(map(len, job.inputs.values())),
                "priority": job.priority,
                "refusal": job.refusal,
            }
            for job in decision.jobs
        ],
    }


def _print(uid: str, decision: Decision) -> None:
    print(f"study {uid}")
    for verdict in decision.series:
        outcome = "matches" if verdict.matches else "does not match"
        print(
            clean(
                f"  series {verdict.series_uid} ({verdict.modality}, {verdict.instances} instances, "
                f"{verdict.description!r})"
            )
        )
        print(f"    {outcome} route {verdict.route!r}")
        for condition in verdict.verdicts:
            print(clean(f"      {'yes' if condition.holds else 'no ':3} {condition}"))
    for job in decision.jobs:
        count = sum(map(len, job.inputs.values()))
        print(
            f"  route {job.route!r} runs {job.model}"
            + (f": refused, {job.refusal}" if job.refusal else f" on {count} instances, {job.priority}")
        )
    if not decision.jobs:
        print(f"  nothing is run: {clean(decision.reason)}")
