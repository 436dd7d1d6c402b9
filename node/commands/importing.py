"""`radnode import`."""

from __future__ import annotations

import argparse
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from node.archive.ingest import Outcome
from node.archive.open import open_archive
from node.commands.output import print_json
from node.config import find_config, load_config
from node.receive.importer import import_path
from node.receive.limits import Limits, Watermark

_SHOWN_REFUSALS = 20


def import_files(options: argparse.Namespace) -> int:
    """Import files; 1 when none was taken. The service, when it runs, routes the studies as they become complete."""
    config = load_config(find_config(options.config))
    archive = open_archive(config)
    watermark = Watermark(archive.storage, config.keep.free_disk)
    counts: Counter[str] = Counter()
    refused: list[dict[str, str]] = []
    console = Console(stderr=True)
    with Progress(
        TextColumn("importing"),
        BarColumn(),
        TextColumn("{task.completed} files"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=options.json,
    ) as progress:
        task = progress.add_task("importing", total=None)
        limits = Limits(maximum_object_bytes=config.receive.maximum_object_bytes)
        for one in import_path(options.path, archive, limits):
            watermark.check()
            progress.advance(task)
            if one.outcome is None:
                refused.append({"file": one.name, "why": one.why})
            else:
                counts[one.outcome] += 1
    archive.close()
    stored, duplicate, conflict = (counts[outcome] for outcome in (Outcome.STORED, Outcome.DUPLICATE, Outcome.CONFLICT))
    if options.json:
        print_json({"stored": stored, "duplicate": duplicate, "conflict": conflict, "refused": refused})
    else:
        print(
            f"{stored} stored, {duplicate} here already, {conflict} in conflict (quarantined), {len(refused)} refused"
        )
        for one in refused[:_SHOWN_REFUSALS]:
            print(f"  refused: {one['file']}: {one['why']}")
        if len(refused) > _SHOWN_REFUSALS:
            print(f"  and {len(refused) - _SHOWN_REFUSALS} more (--json names all)")
    return 0 if stored or duplicate else 1
