"""Makes the screenshots of docs/viewers.md: `python -m tests.viewer.screenshots FOLDER`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.viewer.archive import Archive, Shown, slices_that_differ
from tests.viewer.ohif import Viewer, find_ohif, start_browser
from tests.viewer.origin import Origin, read_config

SHARED_DATA = Path(os.environ.get("RADNODE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
WIDTH = 1000


def main(folder: Path) -> None:
    """Write each picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, start_browser() as browser:
        archive = Archive(SHARED_DATA, Path(scratch))
        with archive.orthanc, Origin(find_ohif(), read_config(), archive.orthanc.http_port) as origin:
            for name, (shown, prepare) in {
                "ohif-philips-binary": (archive.binary, show_segments),
                "ohif-siemens-labelmap": (archive.labelmap, show_segments),
                "ohif-boxes-sr": (archive.boxes, show_mass),
                "ohif-philips-sr": (archive.measured, show_volume),
                "ohif-philips-rtstruct": (archive.structures, show_segments),
            }.items():
                viewer = Viewer(browser, origin.url)
                save(viewer, shown, prepare, folder / f"{name}.jpg")
                viewer.close()


def save(viewer: Viewer, shown: Shown, prepare: Callable[[Viewer, Shown], None], file: Path) -> None:
    """Open a result, prepare what is to be seen, and write a picture of it."""
    viewer.open(*shown.opened)
    prepare(viewer, shown)
    picture = viewer.screenshot()
    height = round(WIDTH * picture.height / picture.width)
    picture.resize((WIDTH, height), Image.Resampling.LANCZOS).save(file, quality=82, optimize=True)
    print(f"{file} {file.stat().st_size / 1000:.0f} kB")


def show_segments(viewer: Viewer, shown: Shown) -> None:
    """A slice on which left and right differ much."""
    viewer.wait_for_segments(*(segment.name for segment in shown.subject.manifest.segments.values()))
    index, _ = slices_that_differ(shown.subject.labelmap.array)
    viewer.show(shown.volume.slices[index].sop_instance_uid)


def show_mass(viewer: Viewer, shown: Shown) -> None:
    """The first box, to which OHIF goes by itself."""
    viewer.wait_for_text("Certainty of Finding")


def show_volume(viewer: Viewer, shown: Shown) -> None:
    """The first segment's numbers."""
    viewer.wait_for_text("Volume")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.viewer.screenshots FOLDER")
    main(Path(sys.argv[1]))
