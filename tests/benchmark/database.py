"""What the database costs a study, with few and with many studies in it: `python -m tests.benchmark.database`.

One process does what the processes of a node do with the database for a study of `--images` instances, from the first
instance to the delivery of two results, with the archive's own functions and empty files; before it the tables are
filled with so many studies that are done. Cases take turns, as a machine's speed drifts. `--postgresql` has a server.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import func, insert, select, update

from node.archive import schema
from node.archive.records import DeliveryState, JobState, Study, StudyState
from node.archive.store import Archive
from node.assemble import complete_studies
from node.deliver.outbox import due_parcels, mark_delivered
from node.dicom.identity import Identity
from node.queue.jobs import NewJob, add_job
from node.queue.leases import claim_job, finish_job, recover_lost_jobs
from node.queue.rows import NewResult
from node.queue.untold import claim_untold
from node.queue.workers import WorkerId
from tests.postgresql import running_postgresql

PER_STUDY = 20  # instances, events of a study that is there before
_PIECE = 500

T = TypeVar("T")


def fill(archive: Archive, studies: int) -> None:
    """Rows of so many studies that are done and delivered, as the node leaves them."""
    with archive.database.write() as connection:
        for begin in range(0, studies, _PIECE):
            numbers = range(begin + 1, min(begin + _PIECE, studies) + 1)
            times = {"first_received_at": 1.0, "last_received_at": 2.0}
            rows = [
                {"study_uid": f"9.{n}", "state": StudyState.ROUTED, "instances": PER_STUDY, **times} for n in numbers
            ]
            ids = list(connection.scalars(insert(schema.studies).returning(schema.studies.c.id), rows))
            connection.execute(
                insert(schema.series), [{"id": i, "study_id": i, "series_uid": f"9.{i}.1", "instances": 1} for i in ids]
            )
            instance = {"sop_class_uid": "1", "transfer_syntax_uid": "1", "size": 1, "sha256": "0" * 64}
            instance |= {"received_from": "CT", "received_at": 1.0}
            connection.execute(
                insert(schema.instances),
                [
                    {"series_id": i, "sop_instance_uid": f"9.{i}.1.{k}", "path": f"instances/{i}/{k}.dcm", **instance}
                    for i in ids
                    for k in range(PER_STUDY)
                ],
            )
            job = {"study_revision": 1, "route": "r", "model": "m", "model_version": "1", "model_digest": "d"}
            job |= {"state": JobState.DONE, "created_at": 1.0, "finished_at": 2.0, "not_before": 0.0, "attempts": 1}
            connection.execute(
                insert(schema.jobs),
                [
                    {"id": i, "key": f"{i:064d}", "study_id": i, "send_to": ["pacs"], "results": ["seg", "sr"], **job}
                    | {"inputs": {"image": [f"9.{i}.1.{k}" for k in range(PER_STUDY)]}}
                    for i in ids
                ],
            )
            connection.execute(
                insert(schema.results),
                [
                    {"id": i, "job_id": i, "kind": "seg", "sop_instance_uid": f"8.{i}", "sop_class_uid": "1"}
                    | {"path": f"results/{i}.dcm", "size": 1, "created_at": 2.0}
                    for i in ids
                ],
            )
            delivered = {"peer": "pacs", "state": DeliveryState.DELIVERED, "created_at": 2.0, "delivered_at": 3.0}
            connection.execute(insert(schema.deliveries), [{"result_id": i, **delivered} for i in ids])
            connection.execute(
                insert(schema.events),
                [
                    {
                        "at": 1.0,
                        "actor": "x",
                        "study_uid": f"9.{n}",
                        "what": "a sentence of a common length in the story",
                    }
                    for n in numbers
                    for _ in range(PER_STUDY // 2)
                ],
            )


class Life:
    """Studies through an archive, each step timed."""

    def __init__(self, archive: Archive, images: int):
        self.archive, self._images = archive, images
        self.steps: dict[str, list[float]] = {}
        self._number = 0
        self._worker = WorkerId.mine()

    def one(self) -> None:
        """A study from its first instance to its last delivery."""
        archive, database = self.archive, self.archive.database
        self._number += 1
        uid = f"7.{self._number}"
        self._timed("receive", lambda: self._receive(uid))
        with database.write() as connection:  # the quiet period is over
            connection.execute(
                update(schema.studies).where(schema.studies.c.study_uid == uid).values(last_received_at=0.0)
            )
        (study,) = self._timed("completion scan", lambda: complete_studies(archive, 1.0))
        instances = self._timed("instances of a study", lambda: archive.instances(study.id))
        names = [instance.sop_instance_uid for instance in instances]
        self._timed("route", lambda: self._route(study, names))
        self._timed("untold scan", lambda: claim_untold(database, self._worker))
        job = self._timed("claim", lambda: claim_job(database, self._worker))
        assert job is not None
        self._timed("lost jobs scan", lambda: recover_lost_jobs(database))
        self._timed("paths of instances", lambda: archive.instance_paths(names))
        results = [
            NewResult(kind, f"6.{self._number}.{kind}", "1", f"results/{kind}", 1, ["pacs"]) for kind in ("seg", "sr")
        ]
        assert self._timed("finish", lambda: finish_job(database, job, self._worker, results, [], "made"))
        parcels = self._timed("deliveries scan", lambda: due_parcels(database, "pacs"))
        assert len(parcels) == 2
        for parcel in parcels:
            self._timed("delivered", lambda parcel=parcel: mark_delivered(database, parcel))
        self._timed("retention scan", lambda: archive.forget_finished(0.0))

    def _timed(self, step: str, does: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = does()
        self.steps.setdefault(step, []).append(time.perf_counter() - begin)
        return result

    def _receive(self, uid: str) -> None:
        for number in range(self._images):
            instance = f"{uid}.1.{number}"
            identity = Identity("1.2.840.10008.5.1.4.1.1.2", instance, uid, f"{uid}.1", "1.2.840.10008.1.2.1")
            with self.archive.spool_file() as spooled:
                spooled.write(instance.encode())
                self.archive.keep_instance(spooled, identity, "CT")

    def _route(self, study: Study, names: list[str]) -> None:
        with self.archive.database.write() as connection:
            new = NewJob("r", "m", "1", "d" * 64, {"image": names}, ["pacs"])
            add_job(connection, study.id, study.study_uid, 1, new, time.time())
            connection.execute(
                update(schema.studies).where(schema.studies.c.id == study.id).values(state=StudyState.ROUTED)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, nargs="+", default=[10, 1_000, 10_000], help="that are there before")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=30, help="studies that are measured of each case")
    parser.add_argument("--postgresql", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        lives = {}
        for studies in options.studies:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radnode-benchmark-")))
            url = f"sqlite:///{folder / 'radnode.sqlite'}"
            if options.postgresql:
                url = stack.enter_context(running_postgresql())
            archive = stack.enter_context(contextlib.closing(Archive(folder / "var", url)))
            fill(archive, studies)
            if options.postgresql:
                with archive.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.exec_driver_sql("ANALYZE")
            lives[studies] = Life(archive, options.images)
        for life in lives.values():
            life.one()  # statements are compiled, pages are in memory
            life.steps.clear()
        for _ in range(options.repeat):
            for life in lives.values():
                life.one()
        tell(lives)


def tell(lives: dict[int, Life]) -> None:
    """Medians in milliseconds, and the most by the fewest."""
    print(f"{'ms':22}" + "".join(f"{studies:>12,}" for studies in lives) + f"{'last/first':>12}")
    first = next(iter(lives.values()))
    totals = [0.0] * len(lives)
    for step in first.steps:
        medians = [1000 * statistics.median(life.steps[step]) for life in lives.values()]
        times = 2 if step == "delivered" else 1
        totals = [total + times * median for total, median in zip(totals, medians, strict=True)]
        print(f"{step:22}" + "".join(f"{one:12.2f}" for one in medians) + f"{medians[-1] / medians[0]:12.2f}")
    print(f"{'a study':22}" + "".join(f"{one:12.2f}" for one in totals) + f"{totals[-1] / totals[0]:12.2f}")
    assert all(len(life.steps) == len(first.steps) for life in lives.values())
    rows = []
    for life in lives.values():
        with life.archive.database.read() as connection:
            rows.append(connection.scalar(select(func.count()).select_from(schema.studies)))
    print(f"studies at the end: {rows}")


if __name__ == "__main__":
    main()
