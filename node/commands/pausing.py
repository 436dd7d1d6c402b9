"""`radnode models pause|resume`, `radnode workers pause|resume`: hold what waits, let what runs end."""

from __future__ import annotations

from argparse import Namespace

from node.archive.open import open_archive
from node.archive.records import JobState
from node.archive.store import Archive
from node.config import find_config, load_config
from node.errors import NotFound
from node.infer.package import discover_packages
from node.queue.jobs import list_jobs
from node.queue.pauses import Held, count_held, pause, resume

ACTOR = "command line"


def pause_model(options: Namespace) -> None:
    """Start nothing more of a model."""
    config = load_config(find_config(options.config))
    archive = open_archive(config)
    packages, _ = discover_packages(config.models.paths)
    known = {package.name for package in packages} | {name for route in config.routes for name in route.run}
    if options.name not in known and not list_jobs(archive.database, model=options.name, limit=1):
        raise NotFound(f"no model {options.name} (there are: {', '.join(sorted(known)) or 'none'})")
    _pause(archive, Held.MODEL, options.name, options.reason)


def resume_model(options: Namespace) -> None:
    """Let a model go on."""
    archive = open_archive(load_config(find_config(options.config)))
    ended = resume(archive.database, Held.MODEL, options.name, ACTOR)
    print(f"model {options.name} goes on" if ended else f"model {options.name} was not paused")


def pause_workers(options: Namespace) -> None:
    """Start nothing more on any worker, or on those of one host."""
    _pause(open_archive(load_config(find_config(options.config))), Held.WORKERS, options.host, options.reason)


def resume_workers(options: Namespace) -> None:
    """Let workers go on."""
    archive = open_archive(load_config(find_config(options.config)))
    ended = resume(archive.database, Held.WORKERS, options.host, ACTOR)
    which = f"the workers of {options.host}" if options.host else "all workers"
    print(f"{which} go on" if ended else f"{which} were not paused")


def _pause(archive: Archive, kind: Held, name: str, reason: str) -> None:
    made = pause(archive.database, kind, name, reason, ACTOR)
    counts = count_held(archive.database, made)
    waiting = f"{counts[JobState.QUEUED]} jobs wait, " if kind is Held.MODEL or not name else ""
    print(f"{made}; {waiting}{counts[JobState.RUNNING]} still run and are finished")
