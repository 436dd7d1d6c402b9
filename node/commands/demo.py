"""`radnode demo`: the whole chain on this machine, over real sockets: a study in, SEG and SR in a PACS, pictures of
both.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydicom.dataset import FileDataset

from node.archive.open import open_archive
from node.archive.records import DeliveryState, Job, JobState, StudyState
from node.archive.store import Archive
from node.commands.output import print_table
from node.commands.packages import shipped_models
from node.commands.run import plan_study, print_measurements, read_studies
from node.config import load_config
from node.deliver.dimse import Address, StoreSession, echo
from node.deliver.outbox import list_parcels
from node.demo.pacs import Pacs, free_port, start_pacs
from node.demo.phantom import Phantom, make_chest_phantom
from node.errors import DeliveryError, NotFound, RadnodeError
from node.infer.package import Package, find_package
from node.queue.jobs import list_jobs

PATIENCE_S = 540.0  # for all of it
QUIET_S = 2.0


def demo(options: Namespace) -> int:
    """Run the demonstration in `--out`, which is made anew."""
    started = time.monotonic()
    out = _fresh_folder(options.out)
    package = find_package(options.model, [*shipped_models(), Path("models")])
    phantom: Phantom | None = None
    if options.folder is None:
        say("making a phantom chest CT")
        phantom = make_chest_phantom(out / "study")
    source = options.folder or out / "study"
    studies = read_studies(source)
    if len(studies) > 1:
        raise RadnodeError(f"{source} holds {len(studies)} studies: the demonstration takes the folder of one")
    study_uid, headers = next(iter(studies.items()))
    say(f"study {study_uid}: {len(headers)} instances from {source}")
    pacs = start_pacs(out / "pacs")
    try:
        say(f"PACS: {pacs.name} as {pacs.ae_title} on 127.0.0.1:{pacs.port}")
        with _node(out, pacs, package) as (address, archive):
            _send(address, sorted(headers))
            job = _follow(archive, study_uid, started)
            in_pacs = _collect(pacs, archive, study_uid, out / "results")
            story = _story(archive, study_uid)
    finally:
        pacs.stop()
    picture = _draw(package, headers, in_pacs, job, out / "results")
    _tell(job, phantom, in_pacs, picture, out, story, time.monotonic() - started)
    return 0


def say(sentence: str) -> None:
    """One line of progress."""
    print(f"  {sentence}", flush=True)


def _fresh_folder(out: Path) -> Path:
    marker = out / ".radnode-demo"
    if out.exists():
        if any(out.iterdir()) and not marker.exists():
            raise RadnodeError(f"{out.absolute()} exists and is not an earlier demonstration: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()
    return out.absolute()


@contextmanager
def _node(out: Path, pacs: Pacs, package: Package) -> Iterator[tuple[Address, Archive]]:
    """A node of its own, served by `radnode serve` as in a hospital."""
    port = free_port()
    configuration = out / "config.yaml"
    configuration.write_text(
        f"""\
node:     {{ae_title: RADNODE, host: 127.0.0.1, port: {port}, storage: ./var}}
peers:
  pacs:   {{ae_title: {pacs.ae_title}, host: 127.0.0.1, port: {pacs.port}}}
  sender: {{ae_title: SCANNER, host: 127.0.0.1}}
receive:  {{from: [pacs, sender]}}
complete: {{quiet: {QUIET_S:.0f}s}}
models:   {{path: {package.folder.parent}}}
routes:
  - {{name: demo, when: {{}}, run: [{package.name}], send_to: [pacs]}}
keep:     {{studies: 7d, free_disk: 100MB}}
"""
    )
    config = load_config(configuration)
    log = out / "node.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "node.cli", "serve", "--config", str(configuration)]
        process = subprocess.Popen(command, stderr=output, stdin=subprocess.DEVNULL)
    try:
        address = Address("RADNODE", "127.0.0.1", port, "SCANNER")
        _await_echo(address, process, log)
        say(f"node: RADNODE on 127.0.0.1:{port}, log in {log}")
        yield address, open_archive(config)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_echo(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            echo(address)
        except DeliveryError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RadnodeError(
                    f"the node did not start ({error}):\n{log.read_text(errors='replace')[-2000:]}"
                ) from error
            time.sleep(0.2)
        else:
            return


def _send(address: Address, files: list[Path]) -> None:
    from rich.console import Console
    from rich.progress import track

    started = time.monotonic()
    bar = track(files, description="  C-STORE to RADNODE", console=Console(), disable=not sys.stdout.isatty())
    with StoreSession(address, files) as session:
        for file in bar:
            session.send(file)
    seconds = time.monotonic() - started
    say(f"{len(files)} instances sent and acknowledged in {seconds:.1f} s")


def _follow(archive: Archive, study_uid: str, started: float) -> Job:
    """Show each stage as it comes, until the results have arrived; the job."""
    from rich.console import Console

    console = Console()
    shown = ""
    with console.status("") if console.is_terminal else _nothing() as status:
        while time.monotonic() - started < PATIENCE_S:
            stage, job, done = _stage(archive, study_uid)
            if stage != shown:
                shown = stage
                say(f"{time.monotonic() - started:5.1f} s  {stage}")
            if status is not None:
                status.update(f"{stage} ...")
            if done:
                assert job is not None
                return job
            time.sleep(0.1)
    raise RadnodeError(f"no result after {PATIENCE_S:.0f} s: {shown}; the node's log says more")


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _stage(archive: Archive, study_uid: str) -> tuple[str, Job | None, bool]:
    """What the study waits for, its job, and whether all is done. Raises when it cannot become done any more."""
    try:
        study = archive.study(study_uid)
    except NotFound:
        return "waiting for the first instance", None, False
    if study.state is StudyState.RECEIVING:
        return f"receiving; complete when nothing came for {QUIET_S:.0f} s", None, False
    if study.state is not StudyState.ROUTED:
        raise RadnodeError(f"the study is {study.state.value}: {study.reason}")
    jobs = [job for job, _ in list_jobs(archive.database, study_id=study.id)]
    job = jobs[0]
    if job.state in (JobState.QUEUED, JobState.RUNNING):
        return f"{job.model}: {job.state.value}" + (f" ({job.reason})" if job.reason else ""), job, False
    if job.state is not JobState.DONE:
        raise RadnodeError(f"{job.model}: {job.state.value}: {job.reason}")
    parcels = list_parcels(archive.database, study_id=study.id)
    arrived = sum(parcel.delivery.state is DeliveryState.DELIVERED for parcel in parcels)
    if failed := [parcel for parcel in parcels if parcel.delivery.state is DeliveryState.FAILED]:
        raise RadnodeError(f"the PACS refused: {failed[0].delivery.reason}")
    return f"delivered {arrived} of {len(parcels)} objects to the PACS", job, arrived == len(parcels)


def _collect(pacs: Pacs, archive: Archive, study_uid: str, folder: Path) -> dict[str, FileDataset]:
    """What the PACS now holds of the results, asked of the PACS itself: kind to object. Saved to `folder`."""
    folder.mkdir(exist_ok=True)
    held = pacs.instances(study_uid)
    parcels = list_parcels(archive.database, study_id=archive.study(study_uid).id)
    found: dict[str, FileDataset] = {}
    for parcel in sorted(parcels, key=lambda parcel: parcel.kind):
        if parcel.sop_instance_uid not in held:
            raise RadnodeError(f"{pacs.name} acknowledged the {parcel.kind} and does not hold it")
        found[parcel.kind] = held[parcel.sop_instance_uid]
        found[parcel.kind].save_as(folder / f"{parcel.kind}.dcm")
    return found


def _draw(package: Package, headers, in_pacs: dict[str, FileDataset], job: Job, folder: Path) -> Path | None:
    """Draw what the PACS holds (its SEG, read back) over the images that were sent."""
    if "seg" not in in_pacs:
        return None
    from datetime import UTC, datetime

    from node import __version__
    from node.dicom.assembly import VolumePlan
    from node.dicom.pixels import read_volume
    from node.report.findings import measure
    from node.report.preview import render_preview
    from node.report.readback import read_labelmap
    from node.report.subject import Subject

    plan = next(iter(plan_study(package, headers).values()))
    if not isinstance(plan, VolumePlan):
        return None
    volume = read_volume(plan)
    subject = Subject(
        key=job.key,
        created=datetime.fromtimestamp(job.created_at, UTC),
        source=volume,
        sources=plan.headers,
        prediction=read_labelmap(in_pacs["seg"], volume, sorted(package.manifest.segments)),
        manifest=package.manifest,
        model_name=package.name,
        model_version=package.version,
        model_digest=package.digest,
        node_version=__version__,
    )
    picture = folder / "preview.png"
    render_preview(measure(subject)).save(picture)
    return picture


def _story(archive: Archive, study_uid: str) -> list[dict[str, object]]:
    events = archive.events(study_uid)
    return [{"after": f"+{line.at - events[0].at:.1f} s", "who": line.actor, "what": line.what} for line in events]


def _tell(
    job: Job,
    phantom: Phantom | None,
    in_pacs: dict[str, FileDataset],
    picture: Path | None,
    out: Path,
    story: list[dict[str, object]],
    seconds: float,
) -> None:
    print("\nwhat happened (radnode studies show)")
    print_table(story, ["after", "who", "what"], empty="")
    print(f"\nmeasurements by {job.model} {job.model_version} (research use, unverified)")
    print_measurements(job.measurements)
    if phantom is not None:
        print("\nagainst the phantom's known volumes")
        print_table(compare_volumes(job, phantom), ["segment", "measured [mL]", "known [mL]", "difference"], empty="")
    print("\nwhere it lies")
    for kind, dataset in in_pacs.items():
        print(f"  {kind.upper():4} {out / 'results' / kind}.dcm  ({dataset.SOPInstanceUID}, as the PACS holds it)")
    if picture:
        print(f"  PNG  {picture}")
    print(f"  node {out / 'config.yaml'}, log {out / 'node.log'}; PACS {out / 'pacs'}")
    print(f"\ndone in {seconds:.0f} s. `radnode serve --config {out / 'config.yaml'}` starts this node again.")


def compare_volumes(job: Job, phantom: Phantom) -> list[dict[str, str]]:
    """Measured against known volumes, by segment name."""
    rows = []
    for row in job.measurements:
        known = phantom.volumes_ml.get(str(row["segment"]).lower()) if row["measurement"] == "volume" else None
        if known:
            measured = float(row["value"])
            rows.append(
                {
                    "segment": row["segment"],
                    "measured [mL]": f"{measured:.1f}",
                    "known [mL]": f"{known:.1f}",
                    "difference": f"{100 * (measured / known - 1):+.2f} %",
                }
            )
    return rows
