"""YAML files that a person writes, read into pydantic models with every mistake at its file, line and field.

Only plain data is read: no tags, no anchors and aliases, no duplicate fields, at most 1 MB. Scalars follow YAML 1.2:
only `true` and `false` are booleans (`YES` and `NO` are DICOM values), and nothing becomes a date, an octal or a
sexagesimal number by accident.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Strict, ValidationError
from yaml.composer import Composer, ComposerError
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from node.errors import FileProblems, Problem

SIZE_MAX = 1_000_000  # bytes
DEPTH_MAX = 40  # nested lists and mappings

Location = tuple[str | int, ...]  # ("routes", 0, "when", "Modality")
Check = Callable[[object], Iterable[tuple[Location, str]]]

WholeNumber = Annotated[int, Strict()]  # neither `true` nor "5"
Number = Annotated[float, Strict()]

ModelT = TypeVar("ModelT", bound=BaseModel)


class Section(BaseModel):
    """A part of a file that a person writes: immutable, and an unknown field is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def load_yaml(
    path: Path,
    model: type[ModelT],
    error: type[FileProblems] = FileProblems,
    *,
    check: Check | None = None,
    context: Mapping[str, Any] | None = None,
) -> ModelT:
    """The file as `model`; raises `error` with every mistake.

    `check` looks at the plain data for what no single field can know, such as a name that must exist elsewhere in the
    file, and gives (location, sentence) of each mistake; it must bear data of any shape, as it also runs on files that
    are wrong. `context` goes to the model's validators.
    """
    document = read_yaml(path, error)
    loaded, problems = document.validate(model, context)
    places = {problem.field for problem in problems}
    for location, sentence in check(document.data) if check else ():
        problem = document.problem(location, sentence)
        if problem.field not in places:  # of a field that is wrong in itself, one sentence is enough
            problems.append(problem)
    if problems or loaded is None:
        raise error(sorted(problems, key=lambda problem: problem.line))
    return loaded


def read_yaml(path: Path, error: type[FileProblems] = FileProblems) -> Document:
    """The file's plain data with the line of every field; raises `error` when it is not YAML that we accept."""
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_MAX + 1)
    except OSError as reason:
        raise error([Problem(path, 0, "", f"cannot be read ({reason.strerror or reason})")]) from None
    if len(raw) > SIZE_MAX:
        raise error([Problem(path, 0, "", f"is larger than {SIZE_MAX:,} bytes; no file of this kind needs that")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        line = raw.count(b"\n", 0, reason.start) + 1
        raise error([Problem(path, line, "", "found bytes that are not UTF-8; save the file as UTF-8 text")]) from None
    try:
        root = _Loader(text).get_single_node()
    except ReaderError as reason:
        line = text.count("\n", 0, reason.position) + 1
        raise error([Problem(path, line, "", "found a control character; expected plain text")]) from None
    except yaml.MarkedYAMLError as reason:
        raise error([Problem(path, _line_of(reason), "", _explain_syntax(reason))]) from None
    document = Document(path)
    if root is not None:
        document.data = document.construct(root, ())
    if document.problems:
        raise error(document.problems)
    return document


@dataclass
class Document:
    """A YAML file as plain data (dict by text, list, str, int, float, bool, None), and where each part stands."""

    file: Path
    data: object = None
    lines: dict[Location, int] = field(default_factory=dict)
    texts: dict[Location, str] = field(default_factory=dict)  # of unquoted scalars, as written
    problems: list[Problem] = field(default_factory=list)

    def problem(self, location: Location, message: str) -> Problem:
        """A mistake at this location, or at the nearest part around it that stands in the file."""
        place = location
        while place and place not in self.lines:
            place = place[:-1]
        return Problem(self.file, self.lines.get(place, 1), write_location(location), message)

    def construct(self, node: yaml.Node, location: Location) -> object:
        """The node's data; notes lines and duplicate fields on the way."""
        self.lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.construct(item, (*location, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._construct_mapping(node, location)
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            self.texts[location] = node.value
        return _CONSTRUCT.get(node.tag, str)(node.value)

    def _construct_mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, object]:
        data: dict[str, object] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                message = "found a field whose name is empty, a list or a mapping; expected a name"
                self.problems.append(Problem(self.file, line, write_location(location), message))
                continue
            place = (*location, key.value)
            if key.value in data:
                message = f"stands here a second time (first in line {self.lines[place]}); expected it once"
                self.problems.append(Problem(self.file, line, write_location(place), message))
                continue
            self.lines[place] = line
            data[key.value] = self.construct(value, place)
        return data

    def validate(
        self, model: type[ModelT], context: Mapping[str, Any] | None = None
    ) -> tuple[ModelT | None, list[Problem]]:
        """The data as `model`, or None and every mistake."""
        try:
            return model.model_validate(self.data, context=dict(context or {})), []
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
        # Where text is expected, an unquoted number is taken as it stands in the file: code values, AE titles, "1.10".
        rewritten = [self._write_as_text(mistake["loc"]) for mistake in mistakes if mistake["type"] == "string_type"]
        if any(rewritten):
            return self.validate(model, context)
        # Pydantic counts the right items only: "too short" beside a wrong item would be a second sentence for it.
        places = [mistake["loc"] for mistake in mistakes]
        wrong_within = {place[:length] for place in places for length in range(len(place))}
        told = [m for m in mistakes if not (m["type"] == "too_short" and m["loc"] in wrong_within)]
        return None, [self._explain(mistake, model) for mistake in told]

    def _write_as_text(self, location: Location) -> bool:
        """Replace the number at this location by its text; False where there is none."""
        if location not in self.texts:
            return False
        holder: Any = self.data
        for step in location[:-1]:
            holder = holder[step]
        if isinstance(holder[location[-1]], bool | str | None):
            return False
        holder[location[-1]] = self.texts[location]
        return True

    def _explain(self, mistake: Mapping[str, Any], model: type[BaseModel]) -> Problem:
        location: Location = mistake["loc"]
        if location and location[-1] == "[key]":
            said = _explain_value(mistake, named=False)
            found = "" if mistake["type"] == "value_error" else f"found the name {_found(mistake['input'])}; "
            return self.problem(location[:-1], found + said)
        if mistake["type"] == "extra_forbidden":
            return self.problem(location, _explain_unknown(str(location[-1]), _names_in(model, location[:-1])))
        return self.problem(location, _explain_value(mistake))


def write_location(location: Location) -> str:
    """`routes[0].when.Modality`."""
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


# -- YAML that we accept -----------------------------------------------------------------------------------------------


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's own stages up to its nodes, with the scalars of YAML 1.2, without what executes or expands."""

    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ComposerError(None, None, "anchor", mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise ComposerError(None, None, "tag", mark)
        if self._depth >= DEPTH_MAX:
            raise ComposerError(None, None, "depth", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


# YAML 1.2.2, 10.3.2 (core schema), without octal, hexadecimal and infinities; long digit strings and those with a
# leading zero stay text, because they are identifiers.
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)

_CONSTRUCT: dict[str, Callable[[str], object]] = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
}

# What PyYAML says (a part of its sentence), and what its reader should know.
_SYNTAX = (
    ("anchor", "found an anchor or alias (& or *), which is not accepted; write the value out, or put text in quotes"),
    ("tag", 'found a tag: text that begins with ! needs quotes, such as "!CT"'),
    ("depth", f"found more than {DEPTH_MAX} lists and mappings in each other; expected a flatter file"),
    (
        "mapping values are not allowed",
        "found a ':' where no field can begin; check the indentation, or quote the text",
    ),
    ("'\\t' that cannot start", "found a tab; YAML is indented with spaces"),
    ("expected a comment or a line break", 'found text that begins with > or |; such text needs quotes, as in "> 5"'),
    ("chomping or indentation", 'found text that begins with > or |; such text needs quotes, as in "> 5"'),
    ("could not find expected ':'", "found text that is neither a field nor a value; expected 'field: value'"),
    ("unexpected end of stream", "found the file's end inside quotes; expected the closing quote"),
    ("expected ',' or ']'", "found a list that is not closed; expected a comma or ]"),
    ("expected ',' or '}'", "found a mapping that is not closed; expected a comma or }"),
    ("expected <block end>", "found something that does not fit the lines above; check indentation, quotes and dashes"),
    ("found another document", "found a second document (---); expected one"),
)


def _line_of(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 0


def _explain_syntax(error: yaml.MarkedYAMLError) -> str:
    said = error.problem or error.context or "no more is known"
    if error.context and "tag" in error.context:
        said = "tag"
    sentence = next((ours for theirs, ours in _SYNTAX if theirs in said), f"is not valid YAML: {said}")
    begin, end = error.context_mark, error.problem_mark
    if begin and end and begin.line < end.line:
        sentence += f" (it began in line {begin.line + 1})"
    return sentence


# -- Pydantic's errors in plain sentences ------------------------------------------------------------------------------

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of names to values",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "list_type": "a list, such as [a, b]",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "path_type": "a path",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} character(s)",
    "string_type": "text",
    "too_long": "at most {max_length} of them",
    "too_short": "at least {min_length} of them",
    "tuple_type": "a list, such as [a, b]",
}


def _explain_value(mistake: Mapping[str, Any], *, named: bool = True) -> str:
    """What was found and what was expected."""
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "missing":
        return "is missing; expected a value"
    if kind == "value_error":
        return str(context["error"])
    said = mistake["msg"]  # by pydantic, of a type that the table does not know
    bounds = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    expected = f"expected {_EXPECTED[kind].format(**bounds)}" if kind in _EXPECTED else said[:1].lower() + said[1:]
    return f"found {_found(mistake['input'])}; {expected}" if named else expected


def _explain_unknown(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}" if known else "remove it"
    return f"is not a known field; {hint}"


def _found(value: object) -> str:
    """The value in words; long text is cut."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping of fields"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, int | float):
        return f"the number {value}"
    text = str(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _names_in(model: object, location: Location) -> tuple[str, ...]:
    """The names, as written in the file, of the fields that the model has at this location."""
    for step in location:
        model = _inside(_without_none(model), step)
    model = _without_none(model)
    return tuple(_fields(model)) if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _inside(model: object, step: str | int) -> object:
    if isinstance(model, type) and issubclass(model, BaseModel):
        return _fields(model).get(str(step))
    arguments = get_args(model)
    origin = get_origin(model)
    if origin is dict:
        return arguments[1]
    return arguments[0] if origin in (list, tuple) else None


def _fields(model: type[BaseModel]) -> dict[str, object]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _without_none(model: object) -> object:
    while get_origin(model) is Annotated:
        model = get_args(model)[0]
    members = [member for member in get_args(model) if member is not NoneType]
    return members[0] if NoneType in get_args(model) and len(members) == 1 else model


def one_or_list(value: object) -> object:
    """A value that stands alone as a list of one: for fields that take either."""
    return value if isinstance(value, list | tuple) else [value]


def mapping_of(value: object) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one: for checks across a file that may be wrong elsewhere."""
    return value if isinstance(value, Mapping) else {}


def listing_of(value: object) -> Iterator[tuple[int, Any]]:
    """The items and their indices where the value is a list, else none: for checks across a file."""
    return iter(enumerate(value)) if isinstance(value, list) else iter(())
