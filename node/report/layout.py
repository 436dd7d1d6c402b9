"""The page of a result: what was found, in radiological display, with its numbers, or that there is none and why.

A page is 1280 pixels wide and at most 1024 high, so that its smallest text is legible on a monitor of that size. It
carries no patient's name, ID or birth date, unless the pixels of the images do: the DICOM header identifies it, and a
viewer that shows the page shows that too.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from node.infer.results import Boxes, Landmarks, Scores
from node.report.colors import RGB, finding_colors, to_rgb
from node.report.drawing import TEXT, draw_panel
from node.report.facts import describe_source, describe_study, image_numbers, list_series, name_slice
from node.report.findings import Findings
from node.report.fonts import load_font, printable, shorten, wrap
from node.report.negative import NoResult
from node.report.page import Panel
from node.report.subject import UNKNOWN, Origin, Subject
from node.report.table import FAINT, Table
from node.report.words import CATALOGUE, Words

WIDTH, HEIGHT = 1280, 1024  # pixels
PANEL = 303
GAP = 6
MARGIN = 25
COLUMNS = 4
LARGE = 2 * PANEL + GAP
BANNER = 44
HEAD = BANNER + 116  # where the panels begin
NOTICE = 62  # height of the box that says that nothing was found
BACKGROUND: RGB = (16, 18, 22)
WARNING: RGB = (255, 196, 84)
DARK: RGB = (38, 28, 4)
NOTABLE: RGB = (120, 190, 255)


def render_page(findings: Findings) -> Image.Image:
    """The page of what was found, RGB.

    Few panels are drawn larger, with the table at their side: a row of one or two small ones would waste the page.
    Where the table is long, the panels that matter stay in one row. A run that found nothing says so above the images.
    """
    subject, panels, lines = findings.subject, findings.panels(), findings.lines()
    words = CATALOGUE[subject.house.language]
    colors = {label: to_rgb(color) for label, color in finding_colors(subject.manifest).items()}
    page = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    _draw_head(page, subject, describe_source(subject, subject.source, words))
    top = HEAD
    if all(line.found is False for line in lines):
        _draw_notice(page, words)
        top += NOTICE + 12
    remarks = _remarks(subject, words)
    end = HEIGHT - 16 - 22 * len(remarks)
    if len(panels) == 1:
        place, width = (2 * MARGIN + LARGE, top - 4), WIDTH - 3 * MARGIN - LARGE
        size, columns, body = LARGE, 1, LARGE
        end = min(end, top + LARGE)
        table = Table(lines, words, width)
    else:
        width = WIDTH - 2 * MARGIN
        table = Table(lines, words, width)
        size, columns = (PANEL, COLUMNS) if len(panels) > 2 else (LARGE, 2)
        body = -(-len(panels) // columns) * (size + GAP) - GAP
        if top + body + 14 + table.height(table.count) > end and body > PANEL:
            panels, size, columns, body = _fewer(panels), PANEL, COLUMNS, PANEL
        place = (MARGIN, top + body + 14)
    numbers = image_numbers(subject)
    for number, panel in enumerate(panels):
        corner = (MARGIN + number % columns * (size + GAP), top + number // columns * (size + GAP))
        page.paste(draw_panel(panel, _caption(panel, subject, words, numbers), colors, size), corner)
    taken = table.draw(page, place, end - place[1], colors)
    bottom = max(top + body, place[1] + taken) + 10
    draw = ImageDraw.Draw(page)
    for number, text in enumerate(remarks):
        draw.text((MARGIN, bottom + 22 * number), text, fill=FAINT, font=load_font(16))
    return page.crop((0, 0, WIDTH, min(HEIGHT, bottom + 22 * len(remarks) + 14)))


def render_negative_page(origin: Origin, state: NoResult, sentence: str) -> Image.Image:
    """The page of a run that gave no result, RGB: what was looked at, why there is none, and what that means."""
    words = CATALOGUE[origin.house.language]
    page = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    _draw_head(page, origin, describe_study(origin, words))
    draw = ImageDraw.Draw(page)
    state_word = {NoResult.NOT_APPLICABLE: words.not_applicable, NoResult.FAILED: words.failed}[state]
    left, room = MARGIN + 32, WIDTH - 2 * MARGIN - 64
    status = f"{words.no_result}{words.colon} {state_word}"
    draw.text((left, HEAD + 24), status, fill=WARNING, font=load_font(44, bold=True))
    y = HEAD + 96
    for text in wrap(f"{words.reason}{words.colon} {sentence}", load_font(24), room, 4):
        draw.text((left, y), text, fill=TEXT, font=load_font(24))
        y += 32
    y += 16
    for text in wrap(words.not_normal, load_font(20, bold=True), room, 2):
        draw.text((left, y), text, fill=WARNING, font=load_font(20, bold=True))
        y += 27
    y += 20
    draw.rectangle((MARGIN, HEAD, WIDTH - MARGIN, y), outline=WARNING, width=4)
    y += 26
    findings = {**origin.manifest.segments, **origin.manifest.classes}
    names = ", ".join(finding.name for _, finding in sorted(findings.items()))
    series = list_series(origin, words)
    shown = series if len(series) <= 12 else [*series[:11], f"... {len(series) - 11}"]
    for head, lines in (
        (words.undetermined, wrap(names, load_font(19), WIDTH - 2 * MARGIN, 5)),
        (words.series, [shorten(line, load_font(19), WIDTH - 2 * MARGIN) for line in shown]),
    ):
        if not lines:
            continue
        draw.text((MARGIN, y), printable(head), fill=FAINT, font=load_font(16))
        for number, line in enumerate(lines):
            draw.text((MARGIN, y + 26 + 27 * number), line, fill=TEXT, font=load_font(19))
        y += 26 + 27 * len(lines) + 20
    return page.crop((0, 0, WIDTH, y))


def draw_banner(page: Image.Image, banner: str, height: int) -> None:
    """The site's banner over the whole width of a picture, as large as it fits on one line or on two."""
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, 0, page.width, height - 1), fill=WARNING)
    words, room, size = printable(banner).split(), page.width - 16, round(height * 0.55)
    while True:
        font = load_font(size, bold=True)
        lines = wrap(banner, font, room, 1 if size > height / 3 else 2)
        if size <= 9 or " ".join(lines).split() == words:
            break
        size -= 1
    for number, line in enumerate(lines):
        middle = height * (2 * number + 1) / (2 * len(lines))
        draw.text((page.width / 2, middle), line, fill=DARK, font=font, anchor="mm")


def _draw_head(page: Image.Image, origin: Origin, facts: Sequence[tuple[str, str]]) -> None:
    """The banner; the model at the left, what it was run on at the right."""
    draw_banner(page, origin.house.banner, BANNER)
    draw = ImageDraw.Draw(page)
    names = max((load_font(16).getlength(name) for name, _ in facts), default=0)
    left = WIDTH // 2 - 40
    title = shorten(origin.manifest.title, load_font(30, bold=True), left - 2 * MARGIN)
    draw.text((MARGIN, BANNER + 44), title, fill=TEXT, font=load_font(30, bold=True), anchor="ls")
    words = CATALOGUE[origin.house.language]
    label = f"{words.model}{words.colon} "
    draw.text((MARGIN, BANNER + 74), label, fill=FAINT, font=load_font(19), anchor="ls")
    indent = load_font(19).getlength(label)
    model = shorten(origin.model, load_font(19), left - 2 * MARGIN - indent)
    draw.text((MARGIN + indent, BANNER + 74), model, fill=TEXT, font=load_font(19), anchor="ls")
    made_by = f"radnode {origin.node_version}"
    if origin.model_digest != UNKNOWN:
        made_by = f"SHA-256 {origin.model_digest[:16]}   {made_by}"
    draw.text((MARGIN, BANNER + 97), made_by, fill=FAINT, font=load_font(15), anchor="ls")
    for number, (name, value) in enumerate(facts):
        y = BANNER + 31 + 23 * number
        draw.text((left, y), name, fill=FAINT, font=load_font(16), anchor="ls")
        start = left + names + 18
        shown = shorten(value, load_font(17), WIDTH - MARGIN - start)
        draw.text((start, y), shown, fill=TEXT, font=load_font(17), anchor="ls")


def _draw_notice(page: Image.Image, words: Words) -> None:
    draw = ImageDraw.Draw(page)
    draw.rectangle((MARGIN, HEAD, WIDTH - MARGIN, HEAD + NOTICE), outline=NOTABLE, width=2)
    head = load_font(22, bold=True)
    draw.text((MARGIN + 16, HEAD + 26), words.nothing_found, fill=NOTABLE, font=head, anchor="ls")
    text = shorten(words.nothing_excluded, load_font(17), WIDTH - 2 * MARGIN - 32)
    draw.text((MARGIN + 16, HEAD + 50), text, fill=TEXT, font=load_font(17), anchor="ls")


def _remarks(subject: Subject, words: Words) -> list[str]:
    """The lines at the page's foot: from which certainty on a finding counts, and what the run wants said."""
    lines = []
    match subject.prediction:
        case Boxes():
            counts = True
        case Landmarks(points):
            counts = any(point.score is not None for point in points)
        case Scores():
            counts = not subject.prediction.exclusive
        case _:
            counts = False
    if counts:
        lines.append(words.threshold.format(percent=f"{100 * subject.manifest.score_min:g}"))
    if remarks := subject.prediction.remarks:
        text = f"{words.remarks}{words.colon} {'; '.join(remarks)}"
        lines += wrap(text, load_font(16), WIDTH - 2 * MARGIN, 3)
    return lines


def _fewer(panels: Sequence[Panel]) -> list[Panel]:
    """One row of them: those that matter, else the first."""
    return ([panel for panel in panels if panel.key] or list(panels))[:COLUMNS]


def _caption(panel: Panel, subject: Subject, words: Words, numbers: dict[str, int]) -> str:
    """What a panel shows, in words; of a slice also the number that viewers show the image under."""
    caption = panel.caption
    if caption is None:
        return ""
    said = getattr(words, caption.what)
    if caption.index is not None:
        said = name_slice(subject, caption.index, words, numbers)
    if caption.said:
        said += f"{words.colon} {caption.said}"
    return said + (f", {words.enlarged}" if caption.enlarged else "")
