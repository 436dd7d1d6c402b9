"""The words on pictures: every language is complete, and the font has every letter."""

from __future__ import annotations

import re
import string
from dataclasses import fields
from typing import get_args

import pytest
from PIL import ImageFont

from node.infer.manifest import Measurement
from node.report.fonts import has_glyph, load_font, printable, shorten, wrap
from node.report.house import Language
from node.report.words import CATALOGUE, Words, show_number

LANGUAGES = get_args(Language)
KEYWORDS = [field.name for field in fields(Words)]


def places(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_every_language_of_the_configuration_has_its_words() -> None:
    assert set(CATALOGUE) == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_is_complete_and_can_be_drawn(language: Language) -> None:
    for keyword in KEYWORDS:
        text = getattr(CATALOGUE[language], keyword)
        assert text.strip(), keyword
        assert places(text) == places(getattr(CATALOGUE["en"], keyword)), keyword
        assert printable(text) == text.strip(), keyword


@pytest.mark.parametrize("keyword", ["not_found", "no_result", "not_normal", "nothing_found", "nothing_excluded"])
def test_what_is_not_known_is_said_in_each_language_by_its_own_words(keyword: str) -> None:
    assert len({getattr(words, keyword) for words in CATALOGUE.values()}) == len(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_measurement_has_its_word(language: Language) -> None:
    words = CATALOGUE[language]
    for measurement in Measurement:
        name = measurement.value
        keyword = re.sub(r" \d+$", "", name).replace(" ", "_").lower()
        assert keyword in KEYWORDS
        assert words.measurement(name).startswith(getattr(words, keyword))


def test_a_measurement_with_a_number_and_one_without_a_word() -> None:
    german = CATALOGUE["de"]
    assert german.measurement("percentile 10") == "Perzentil 10"
    assert german.measurement("maximum 3D diameter") == "max. 3D-Durchmesser"
    assert german.measurement("standard deviation") == "Std.-Abw."
    assert german.measurement("elongation") == "elongation"
    assert german.measurement("measurement") == "measurement"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (4031.2449, "mL", "4031.2"),
        (0.01234, "mL", "0.012"),
        (3.14159, "mL", "3.14"),
        (-852.3456, "HU", "-852.3"),
        (-0.04, "HU", "0.0"),
        (68.98, "mm", "69.0"),
        (123456.7, "Bq/ml", "123457"),
        (47, "", "47"),
        (0.5, "", "0.500"),
        (72.04, "%", "72.0"),
        (12.74996, "mL", "12.8"),  # 12.75 in the report, of which this is the rounding
        (1e30, "HU", "1e+30"),
        (-2.5e9, "", "-2.5e+09"),
    ],
)
def test_numbers_have_the_digits_that_count(value: float, unit: str, shown: str) -> None:
    assert show_number(value, unit) == shown


def test_the_font_is_the_package_s_own() -> None:
    for bold, style in ((False, "Regular"), (True, "Bold")):
        font = load_font(18, bold=bold)
        assert font.getname() == ("Roboto", style)
        assert font.layout_engine == ImageFont.Layout.BASIC  # the other one loads libraries of the machine
    assert all(has_glyph(letter) for letter in "äöüßÄÖÜéèêëàâçîïôûœñáíóúìòùĳ¿¡«»–—µ²³°±×≤≥ŁőšžЖя")


def test_what_has_no_glyph_is_a_question_mark() -> None:
    assert printable("肺 Thorax\n5.0") == "? Thorax 5.0"
    assert printable("Scha\u0308del") == "Schädel"  # composed: the font has no free accents in their place


def test_text_is_cut_to_its_room() -> None:
    font = load_font(18)
    text = "Segmentation of one hundred and four structures of the trunk"
    assert shorten(text, font, 1000) == text
    cut = shorten(text, font, 200)
    assert cut.endswith("...")
    assert font.getlength(cut) <= 200
    lines = wrap(text, font, 200, 2)
    assert len(lines) == 2
    assert lines[1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert " ".join(wrap(text, font, 200, 9)) == text
