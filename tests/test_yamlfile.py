"""YAML files: only plain data, and every mistake at its file, line and field in a plain sentence."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from node.errors import ConfigError, FileProblems, ManifestError, Problem
from node.yamlfile import (
    DEPTH_MAX,
    SIZE_MAX,
    Location,
    Number,
    Section,
    WholeNumber,
    load_yaml,
    read_yaml,
    write_location,
)


class Rank(StrEnum):
    THINNEST = "thinnest"
    NEWEST = "newest"


class Limits(Section):
    slices_min: WholeNumber = Field(default=1, ge=1)
    spacing_max_mm: Number | None = Field(default=None, gt=0)


class Input(Section):
    limits: Limits | None = None
    rank: tuple[Rank, ...] = ()


class File(Section):
    title: str = Field(default="none", min_length=1, max_length=10)
    version: str = ""
    names: tuple[str, ...] = ()
    inputs: dict[str, Input] = Field(default_factory=dict)
    segments: dict[Annotated[int, Field(ge=1)], str] = Field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    path: Path | None = None


class Needing(Section):
    inner: Limits
    title: str


def problems_of(path: Path, text: str | bytes, model: type[Section] = File) -> tuple[Problem, ...]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ManifestError) as refusal:
        load_yaml(path, model, ManifestError)
    assert all(problem.file == path for problem in refusal.value.problems)
    return refusal.value.problems


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "dicom.yaml"


MISTAKES = [
    ("title: x\ntilte: y\n", 2, "tilte", "is not a known field; did you mean title?"),
    ("zzz: 1\n", 1, "zzz",
     "is not a known field; expected one of title, version, names, inputs, segments, kind, flag, path"),
    ("inputs:\n  image:\n    limits: {slice_min: 3}\n", 3, "inputs.image.limits.slice_min",
     "is not a known field; did you mean slices_min?"),
    ("inputs:\n  image:\n    limits:\n      slices_min: many\n", 4, "inputs.image.limits.slices_min",
     "found 'many'; expected a whole number"),
    ("inputs: {image: {limits: {slices_min: 0}}}\n", 1, "inputs.image.limits.slices_min",
     "found the number 0; expected a number of at least 1"),
    ("inputs: {image: {limits: {slices_min: true}}}\n", 1, "inputs.image.limits.slices_min",
     "found true; expected a whole number"),
    ("inputs: {image: {limits: {slices_min: '3'}}}\n", 1, "inputs.image.limits.slices_min",
     "found '3'; expected a whole number"),
    ("inputs: {image: {limits: {spacing_max_mm: -1.5}}}\n", 1, "inputs.image.limits.spacing_max_mm",
     "found the number -1.5; expected a number greater than 0"),
    ("inputs: {image: {limits: {spacing_max_mm: .inf}}}\n", 1, "inputs.image.limits.spacing_max_mm",
     "found '.inf'; expected a number"),
    ("inputs: {image: {limits: {spacing_max_mm: 1e999}}}\n", 1, "inputs.image.limits.spacing_max_mm",
     "found the number inf; expected a finite number"),
    ("\ninputs:\n  image:\n    rank:\n    - thinnest\n    - oldest\n", 6, "inputs.image.rank[1]",
     "found 'oldest'; expected 'thinnest' or 'newest'"),
    ("kind: c\n", 1, "kind", "found 'c'; expected 'a' or 'b'"),
    ("flag: 'true or so'\n", 1, "flag", "found 'true or so'; expected true or false"),
    ("names: one\n", 1, "names", "found 'one'; expected a list, such as [a, b]"),
    ("names: [[1]]\n", 1, "names[0]", "found a list of 1; expected text"),
    ("names: [~]\n", 1, "names[0]", "found nothing; expected text"),
    ("names: [true]\n", 1, "names[0]", "found true; expected text"),
    ("inputs: [image]\n", 1, "inputs", "found a list of 1; expected a mapping of names to values"),
    ("inputs:\n  image: 5\n", 2, "inputs.image", "found the number 5; expected a mapping of fields"),
    ("title: ''\n", 1, "title", "found ''; expected at least 1 character(s)"),
    ("title: much too long\n", 1, "title", "found 'much too long'; expected at most 10 characters"),
    ("segments:\n  1: left\n  0: right\n", 3, "segments.0", "found the name '0'; expected a number of at least 1"),
    ("segments: {one: left}\n", 1, "segments.one", "found the name 'one'; expected a whole number"),
    ("- title\n", 1, "", "found a list of 1; expected a mapping of fields"),
    ("", 1, "", "found nothing; expected a mapping of fields"),
    ("# only a comment\n", 1, "", "found nothing; expected a mapping of fields"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "field", "message"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_mistake_has_its_line_field_and_sentence(file: Path, text: str, line: int, field: str, message: str) -> None:
    assert problems_of(file, text) == (Problem(file, line, field, message),)


def test_missing_field_stands_at_its_parent(file: Path) -> None:
    (problem,) = problems_of(file, "# comment\ninner: {}\n", Needing)
    assert (problem.line, problem.field, problem.message) == (2, "title", "is missing; expected a value")


SYNTAX = [
    ("title: a\n\tversion: b\n", 2, "found a tab; YAML is indented with spaces"),
    ("title: a: b\n", 1, "found a ':' where no field can begin"),
    ("title: > 5\n", 1, 'text needs quotes, as in "> 5"'),
    ("title: !CT\n", 1, 'found a tag: text that begins with ! needs quotes, such as "!CT"'),
    ("title: !!python/object/apply:os.system [ls]\n", 1, "found a tag"),
    ("title: &a x\nversion: *a\n", 1, "found an anchor or alias"),
    ("title: x\nversion: *a\n", 2, "found an anchor or alias"),
    ("title: x\ntitle: y\n", 2, "stands here a second time (first in line 1); expected it once"),
    ("segments: {1: a, '1': b}\n", 1, "stands here a second time"),
    ("inputs:\n  [a, b]: c\n", 2, "found a field whose name is empty, a list or a mapping"),
    ("names: [a,\ntitle: b\n", 3, "found a list that is not closed; expected a comma or ] (it began in line 1)"),
    ("title: 'a\n\n\n", 4, "found the file's end inside quotes"),
    ("title: a\n--- \ntitle: b\n", 2, "found a second document"),
    ("title\nversion: a\n", 2, "found a ':' where no field can begin"),
    ("title: a\n- b\n", 2, "found something that does not fit the lines above"),
    ("title: a\x07\n", 1, "found a control character"),
    (b"title: a\nversion: \xff\n", 2, "found bytes that are not UTF-8"),
    ("[" * (DEPTH_MAX + 1), 1, f"found more than {DEPTH_MAX} lists and mappings in each other"),
    ("title: %\n", 1, "is not valid YAML: found character '%' that cannot start any token"),
]


@pytest.mark.parametrize(("text", "line", "message"), SYNTAX, ids=[str(case[0])[:30] for case in SYNTAX])
def test_what_is_not_plain_yaml_is_refused(file: Path, text: str | bytes, line: int, message: str) -> None:
    (problem,) = problems_of(file, text)
    assert problem.line == line
    assert message in problem.message


def test_deep_nesting_is_refused_before_it_exhausts_the_stack(file: Path) -> None:
    (problem,) = problems_of(file, "a: " + "[" * 100_000)
    assert "lists and mappings in each other" in problem.message


def test_file_that_is_too_large_or_missing(file: Path) -> None:
    (problem,) = problems_of(file, "#" * (SIZE_MAX + 1))
    assert (problem.line, problem.message) == (0, "is larger than 1,000,000 bytes; no file of this kind needs that")
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file or directory\)"):
        load_yaml(file.with_name("absent.yaml"), File, ConfigError)


def test_all_mistakes_come_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = "kind: c\ninputs:\n  image: {limits: {slices_min: 0, size: 1}}\nnames: [a, [b]]\ntitel: x\nversion: 1.10\n"
    problems = problems_of(file, text)
    assert [(problem.line, problem.field) for problem in problems] == [
        (1, "kind"),
        (3, "inputs.image.limits.slices_min"),
        (3, "inputs.image.limits.size"),
        (4, "names[1]"),
        (5, "titel"),
    ]
    error = ManifestError(problems)
    assert str(error).splitlines()[0] == f"{file}:1: kind: found 'c'; expected 'a' or 'b'"


def test_scalars_are_those_of_yaml_1_2(file: Path) -> None:
    file.write_text(
        "[YES, no, on, true, 012, 12:30, 2024-01-31, 1_000, 0x1F, "
        "12345678901234567890, 3, -4.5, 1e3, ~, null, '3', <<]\n"
    )
    assert read_yaml(file).data == [
        *("YES", "no", "on", True, "012", "12:30", "2024-01-31", "1_000", "0x1F", "12345678901234567890"),
        *(3, -4.5, 1000.0, None, None, "3", "<<"),
    ]


def test_unquoted_numbers_are_text_where_text_is_expected(file: Path) -> None:
    file.write_text("title: 1234\nversion: 1.10\nnames: [39607008, +5, 1e3, x]\nsegments: {1: 7, 2: lung}\n")
    loaded = load_yaml(file, File)
    assert (loaded.title, loaded.version, loaded.names) == ("1234", "1.10", ("39607008", "+5", "1e3", "x"))
    assert loaded.segments == {1: "7", 2: "lung"}


def test_byte_order_mark_and_windows_line_ends(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbftitle: a\r\nversion: b\r\n")
    assert load_yaml(file, File).version == "b"
    (problem,) = problems_of(file, b"title: a\r\nkind: c\r\n")
    assert problem.line == 2


def test_check_adds_what_no_field_knows_and_not_twice(file: Path) -> None:
    def check(data: object) -> Iterator[tuple[Location, str]]:
        yield ("names", 1), "is unknown"
        yield ("kind",), "is strange too"
        yield ("title", "below"), "stands nowhere"

    file.write_text("title: a\nkind: c\nnames:\n  - a\n  - b\n")
    with pytest.raises(FileProblems) as refusal:
        load_yaml(file, File, check=check)
    assert [(problem.line, problem.field) for problem in refusal.value.problems] == [
        (1, "title.below"),
        (2, "kind"),
        (5, "names[1]"),
    ]


def test_location_is_a_dotted_path() -> None:
    assert write_location(("routes", 0, "when", "Modality")) == "routes[0].when.Modality"
    assert write_location(()) == ""


PIECES = st.sampled_from(
    [
        "\n",
        "\n  ",
        "---\n",
        "\t",
        "\x00",
        "\ud7ff",
        ": ",
        *"-[]{},'\"!|>%#~?\\",
        "&a",
        "*a",
        "<<",
        "1",
        "-1.5",
        "1e5",
        "true",
    ]
)
NAMES = st.sampled_from(["title", "names", "inputs", "image", "limits", "segments", "- "])


@settings(max_examples=400, deadline=None)
@given(text=st.lists(PIECES | NAMES, max_size=25).map("".join) | st.text(max_size=40))
def test_any_text_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    problems: tuple[Problem, ...] = ()
    try:
        read = load_yaml(file, File)
    except FileProblems as error:
        problems, read = error.problems, None
    assert (read is None) == bool(problems)
    for problem in problems:
        assert 0 <= problem.line <= len(text.splitlines()) + 1
        assert problem.message
