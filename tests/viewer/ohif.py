"""OHIF in headless Chromium, as a radiologist would use it: open a study, load a result, scroll, read what is shown.

Where images, segmentations and annotations are on the screen is asked of the page; what they should look like is not.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

PATIENCE_S = 90.0  # software rendering on two busy cores
SIZE = {"width": 1280, "height": 800}
_SERVICES = """
    const {viewportGridService, cornerstoneViewportService, segmentationService} = window.services ?? {};
    let id, viewport;
    try {
        id = viewportGridService.getActiveViewportId();
        viewport = cornerstoneViewportService.getCornerstoneViewport(id);
    } catch {} // while the page is being built, or another viewport comes in its place
"""
_IS_TAKEN_UP = """
    return window.services.displaySetService.activeDisplaySets.some(
        series => series.SeriesInstanceUID === argument && (series.loading || series.isLoaded))
"""


def find_ohif() -> Path:
    """OHIF's built files, which `.ci/setup test` puts beside the tests' own; a machine without them fails."""
    root = Path(__file__).parents[2]
    dist = Path(os.environ.get("RADNODE_OHIF") or root / ".ohif" / "dist")
    assert (dist / "index.html").is_file(), (
        f"OHIF is not at {dist}: bash .ci/setup test fetches it (npm's @ohif/app); RADNODE_OHIF names another place"
    )
    return dist


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Chromium without a screen and without a graphics card."""
    program = shutil.which("chromium")
    assert program, "Chromium is not installed (Debian: apt-get install --no-install-recommends chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        )
        try:
            yield browser
        finally:
            browser.close()


class Viewer:
    """One page of OHIF."""

    def __init__(self, browser: Browser, url: str):
        self.page: Page = browser.new_page(viewport=SIZE)  # pyright: ignore[reportArgumentType]
        self.page.set_default_timeout(1000 * PATIENCE_S)
        # No tour of the buttons on top of the images.
        self.page.add_init_script("localStorage.setItem('shownTours', JSON.stringify(['basicViewerTour']))")
        self.errors: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._url = url

    def open(self, study_uid: str, series_uid: str, result_uid: str) -> None:
        """The images of a series, with one series of results beside them; the result loaded."""
        series = f"{series_uid},{result_uid}"
        self.page.goto(f"{self._url}/viewer?StudyInstanceUIDs={study_uid}&SeriesInstanceUIDs={series}")
        self._ask_until("return viewport?.csImage?.imageId && viewport.getImageIds().length", "the images are shown")
        # A double click is lost where the list is drawn anew between its halves; who sees nothing come clicks again.
        for patience_s in (15, 30, PATIENCE_S):
            self.page.dblclick("[data-cy='study-browser-thumbnail-no-image']")
            if self._holds_within(patience_s, lambda: bool(self._ask(_IS_TAKEN_UP, result_uid))):
                return
        raise AssertionError(f"OHIF does not take up the series {result_uid}; it said {self.said()}")

    def wait_for_segments(self, *names: str) -> None:
        """Until the segmentation lies over the images; its panel, with the names of its segments, is opened."""
        self._ask_until(
            "return viewport && segmentationService.getSegmentationRepresentations(id).length", "the SEG is loaded"
        )
        self.page.click("[data-cy='panelSegmentation-btn']")
        for name in names:
            self.page.wait_for_selector(f"text='{name}'")

    def wait_for_text(self, text: str) -> None:
        """Until the text stands in the image, as beside a measurement."""
        wait_until(
            lambda: text in self.annotations(), f"OHIF shows {text!r}", lambda: self.annotations() or self.said()
        )

    def show(self, sop_instance_uid: str) -> None:
        """Scroll to an image. By number and not by the wheel, whose steps an overloaded machine runs together."""
        self._ask(
            "const index = viewport.getImageIds().findIndex(name => name.includes(argument + '/'));"
            "return viewport.setImageIdIndex(index).then(() => index)",
            sop_instance_uid,
        )
        wait_until(lambda: sop_instance_uid == self.shown(), f"OHIF shows {sop_instance_uid}", self.said)

    def shown(self) -> str:
        """SOP Instance UID of the image on the screen."""
        name = str(self._ask("return viewport?.csImage?.imageId ?? ''"))
        return name.rpartition("/instances/")[2].partition("/")[0]

    def annotations(self) -> str:
        """All text that is drawn over the images, a line each."""
        lines = self.page.evaluate(
            "[...document.querySelectorAll('svg.svg-layer tspan')].map(line => line.textContent)"
        )
        return "\n".join(lines)

    def outlines(self) -> list[NDArray[np.float64]]:
        """The closed lines that are drawn over the images: (n, 2) x and y in pixels of `pixels()`."""
        drawn = self.page.evaluate(
            "[...document.querySelectorAll('svg.svg-layer polyline')].map(line => line.getAttribute('points'))"
        )
        return [np.array(points.replace(",", " ").split(), float).reshape(-1, 2) for points in drawn]

    def contours(self) -> list[tuple[tuple[int, ...], NDArray[np.float64]]]:
        """The contours of structure sets: colour (sRGB) and (n, 2) x and y in pixels of `pixels()`."""
        drawn = self.page.evaluate(
            "[...document.querySelectorAll('svg.svg-layer path[stroke^=rgb]')]"
            ".map(path => [path.getAttribute('stroke'), path.getAttribute('d')])"
        )
        numbers = [[re.findall(r"-?[\d.]+(?:e-?\d+)?", text) for text in both] for both in drawn]
        return [
            (tuple(int(each) for each in colour[:3]), np.array(points, float).reshape(-1, 2))
            for colour, points in numbers
        ]

    def arrows(self) -> list[NDArray[np.float64]]:
        """Where the arrows to points begin and end: (2, 2) x and y each."""
        drawn = self.page.evaluate(
            "[...document.querySelectorAll('svg.svg-layer line')]"
            ".map(line => ['x1', 'y1', 'x2', 'y2'].map(end => Number(line.getAttribute(end))))"
        )
        return [np.array(ends).reshape(2, 2) for ends in drawn]

    def pixels(self) -> NDArray[np.uint8]:
        """The images as rendered (rows, columns, RGB), without text and lines; once nothing moves any more."""
        last = self._canvas()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            time.sleep(0.5)
            now = self._canvas()
            if now.shape == last.shape and (now == last).all() and now.any():
                return now
            assert time.monotonic() < deadline, f"OHIF's picture does not come to rest; it said {self.said()}"
            last = now

    def window(self) -> tuple[float, float]:
        """The values that are black and white on the screen."""
        lower, upper = self._ask("const {lower, upper} = viewport.getProperties().voiRange; return [lower, upper]")
        return lower, upper

    def place(self, points_lps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where points of the patient (n, 3), LPS mm, lie in `pixels()`: (n, 2) x and y."""
        return np.array(
            self._ask("return argument.map(point => [...viewport.worldToCanvas(point)])", points_lps.tolist())
        )

    def screenshot(self) -> Image.Image:
        """The whole window."""
        self.pixels()
        return Image.open(BytesIO(self.page.screenshot())).convert("RGB")

    def said(self) -> str:
        """What the page complained of."""
        return "\n".join(self.errors[-5:]) or "nothing"

    def close(self) -> None:
        """Close the page."""
        self.page.close()

    def _canvas(self) -> NDArray[np.uint8]:
        data = self._ask("return viewport.canvas.toDataURL()")
        return np.asarray(Image.open(BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))

    def _ask(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(f"argument => {{ {_SERVICES} {script} }}", argument)

    def _holds_within(self, patience_s: float, holds: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + patience_s
        while not (found := holds()) and time.monotonic() < deadline:
            time.sleep(0.3)
        return found

    def _ask_until(self, script: str, what: str) -> None:
        wait_until(lambda: bool(self._ask(f"{script}")), what, self.said)

    def _listen(self, message: ConsoleMessage) -> None:
        # OHIF's error boundary writes what it caught as a debug message.
        if message.type in ("error", "warning") or "Error" in message.text:
            self.errors.append(message.text[:400])


def wait_until(holds: Callable[[], bool], what: str, said: Callable[[], str]) -> None:
    """Poll until `holds()`; fails with `what`, and with what was `said` instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s: {what}; instead: {said()}"
        time.sleep(0.2)
