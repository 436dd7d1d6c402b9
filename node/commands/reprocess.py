"""`radnode reprocess`: a study once more, from the archive, through the queue."""

from __future__ import annotations

from argparse import Namespace

from node.archive.open import open_archive
from node.archive.records import StudyState
from node.config import find_config, load_config
from node.errors import RadnodeError
from node.infer.shelf import PackageShelf
from node.route import route_study


def reprocess(options: Namespace) -> int:
    """Route the study again and queue its jobs again. Unchanged work makes the same objects with the same UIDs."""
    config = load_config(find_config(options.config))
    archive = open_archive(config)
    study = archive.study(options.study)
    if study.state is StudyState.QUARANTINED:
        raise RadnodeError(f"study {study.study_uid} is in quarantine: {study.reason}")
    shelf = PackageShelf(config.models.paths, config.models.trusted)
    decision = route_study(archive, study, config.routes, shelf.look_up, rerun_as="reprocess")
    if decision is None:
        raise RadnodeError(f"study {study.study_uid} is still being received: it will be processed when it is complete")
    for job in decision.jobs:
        print(f"{job.model}: " + (f"refused, {job.refusal}" if job.refusal else "queued"))
    if not decision.jobs:
        print(f"no route wants this study: {decision.reason}")
    return 0 if decision.jobs else 1
