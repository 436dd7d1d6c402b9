"""A node under fire: studies come in while kill -9 hits one of its processes every other second."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydicom import dcmread
from pydicom.uid import generate_uid

from node.demo.pacs import Orthanc
from node.demo.phantom import make_chest_phantom
from tests.running_node import RunningNode, wait_until

EVERY_S = 2.0
QUIET = (
    "8s"  # longer than a node takes to come back, so that a cut transfer goes on before the study counts as complete
)


@dataclass
class Fire:
    """What was killed, and what came back."""

    killed: Counter[str] = field(default_factory=Counter)
    studies: int = 0
    resent: int = 0  # transfers that a dead receiver cut, and that were sent again


def make_studies(folder: Path, count: int) -> dict[str, Path]:
    """Small chest CT of one phantom, each a study of its own: Study Instance UID to folder."""
    first = make_chest_phantom(folder / "phantom", slices=16, spacing_mm=(17.0, 6.0, 6.0), shape=(64, 64))
    images = [dcmread(path) for path in first.paths]
    studies: dict[str, Path] = {}
    for number in range(count):
        uids = {"StudyInstanceUID": generate_uid(), "SeriesInstanceUID": generate_uid()}
        place = folder / f"study-{number:04d}"
        place.mkdir()
        for index, image in enumerate(images):
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            for keyword, value in uids.items():
                setattr(image, keyword, value)
            image.save_as(place / f"{index:02d}.dcm")
        studies[uids["StudyInstanceUID"]] = place
    shutil.rmtree(folder / "phantom")
    return studies


def under_fire(node: RunningNode, studies: dict[str, Path], seconds: float, *, seed: int) -> Fire:
    """Send the studies, and for `seconds` kill a random process of the node every `EVERY_S`; the node runs at the end.

    A supervisor that is killed is started again when its children have gone, as systemd does.
    """
    fire = Fire(studies=len(studies))
    over = threading.Event()
    sender = threading.Thread(target=_send_all, args=(node, list(studies.values()), fire, over), name="sender")
    sender.start()
    try:
        dice = random.Random(seed)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(EVERY_S)
            _kill_one(node, dice, fire)
        sender.join(600)
        assert not sender.is_alive(), "the studies were not taken within ten minutes after the fire"
    finally:
        over.set()
        sender.join()
    return fire


def wait_for_results(pacs: Orthanc, studies: dict[str, Path], classes: set[str], patience_s: float) -> None:
    """Until each study has one object of each of these SOP classes at the PACS; fails where there are more."""
    missing = dict(studies)

    def all_there() -> bool:
        for study_uid in list(missing):
            found = [str(dataset.SOPClassUID) for dataset in pacs.instances(study_uid).values()]
            assert len(found) == len(set(found)), f"several results of one kind: {found}"
            if set(found) == classes:
                del missing[study_uid]
        return not missing

    wait_until(all_there, patience_s, f"all results of {len(studies)} studies")


def _kill_one(node: RunningNode, dice: random.Random, fire: Fire) -> None:
    processes = node.processes()
    if not processes:
        return
    name = dice.choice(sorted(processes))
    processes[name].kill()
    fire.killed[name] += 1
    if name == "supervisor":
        assert node.process is not None
        node.process.wait(30)
        _, alive = psutil.wait_procs(list(node.processes().values()), timeout=90)
        assert not alive, "children of a killed supervisor stay"
        node.start()


def _send_all(node: RunningNode, folders: list[Path], fire: Fire, over: threading.Event) -> None:
    """As a modality does: what was not taken is sent again, until it is."""
    for folder in folders:
        while not over.is_set() and not _send(node, folder):
            fire.resent += 1
            over.wait(0.5)


def _send(node: RunningNode, folder: Path) -> bool:
    command = ["storescu", "-aec", "RADNODE", "--timeout", "5", "+sd", "127.0.0.1", str(node.port), str(folder)]
    done = subprocess.run(command, env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, timeout=300, check=False)
    return done.returncode == 0
