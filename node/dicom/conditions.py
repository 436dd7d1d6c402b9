"""Conditions on a data set, as routes and model packages write them: `{Modality: CT, SliceThickness: "<= 8"}`.

A condition is data, never code: a literal, a list of which one must fit, a `/regex/`, a comparison with a number, a
negation with `!`, or `null` for an element that is absent or empty. Every condition can be explained in a sentence that
shows nothing which identifies the patient. The user's description is `docs/configuration.md`.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema
    from pydicom.dataset import Dataset

Atom = str | int | float | None
Written = Atom | tuple[Atom, ...]  # a condition as its writer wrote it; a list becomes a tuple

ABSENT = "absent"
NOT_SHOWN = "(not shown)"


@dataclass(frozen=True)
class Verdict:
    """What one condition says of one data set; its text is a sentence for people, without patient data."""

    keyword: str
    expected: str  # as written, `CHEST, THORAX or null`; "(not shown)" for what identifies a patient
    found: str  # the element's values, "absent", or "(not shown)" for what identifies a patient
    holds: bool

    def __str__(self) -> str:
        return f"{self.keyword} is {self.found}, which {'fits' if self.holds else 'does not fit'} {self.expected}"


class When(Mapping[str, Written]):
    """Conditions that must all hold, keyed by DICOM keyword; immutable, and a field type for pydantic models.

    As a mapping it gives each condition as it was written. Without conditions it holds for every data set.
    Raises `ValueError` with every mistake when a condition makes no sense.
    """

    __slots__ = ("_conditions",)

    def __init__(self, conditions: Mapping[str, Any] | None = None):
        parsed, mistakes = _parse_conditions(conditions or {})
        if mistakes:
            raise ValueError("; ".join(f"{keyword}: {message}" for keyword, message in mistakes))
        self._conditions = parsed

    def explain(self, dataset: Dataset) -> tuple[Verdict, ...]:
        """One verdict per condition, in the order in which they were written."""
        return tuple(condition.judge(dataset) for condition in self._conditions.values())

    def matches(self, dataset: Dataset) -> bool:
        """Whether every condition holds for the data set."""
        return all(condition.holds_for(_values_of(dataset, condition.tag)) for condition in self._conditions.values())

    def __getitem__(self, keyword: str) -> Written:
        return self._conditions[keyword].written

    def __iter__(self) -> Iterator[str]:
        return iter(self._conditions)

    def __len__(self) -> int:
        return len(self._conditions)

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return f"When({dict(self)!r})"

    def __reduce__(self) -> tuple[type[When], tuple[dict[str, Written]]]:
        return When, (dict(self),)  # workers are spawned and take their configuration along

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(dict)
        )

    @classmethod
    def _validate(cls, value: object) -> When:
        """As `When(value)`, but each mistake stands at its own keyword."""
        from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

        if isinstance(value, When):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("dict_type", "expected conditions keyed by DICOM keyword")
        parsed, mistakes = _parse_conditions(value)
        if mistakes:
            details: list[InitErrorDetails] = [
                {
                    "type": PydanticCustomError("value_error", "{error}", {"error": message}),
                    "loc": (keyword,),
                    "input": None,
                }
                for keyword, message in mistakes
            ]
            raise ValidationError.from_exception_data("When", details)
        when = cls()
        when._conditions = parsed
        return when


@dataclass(frozen=True)
class _Values:
    """What a data set holds of one element."""

    texts: tuple[str, ...]  # trimmed, without empty values
    numbers: tuple[float, ...]  # those values that are numbers; an age in years

    def __bool__(self) -> bool:
        return bool(self.texts)


Test = Callable[[_Values], bool]


@dataclass(frozen=True)
class _Condition:
    keyword: str
    tag: int
    written: Written
    identifying: bool
    negated: bool
    tests: tuple[Test, ...]  # any of them

    def holds_for(self, values: _Values) -> bool:
        return any(test(values) for test in self.tests) != self.negated

    def judge(self, dataset: Dataset) -> Verdict:
        values = _values_of(dataset, self.tag)
        found = "\\".join(_printable(text) for text in values.texts) if values else ABSENT
        if self.identifying and values:
            found = NOT_SHOWN
        # What identifies a patient is not repeated from the configuration either: "fits 4711" would tell it.
        expected = NOT_SHOWN if self.identifying and self.written is not None else _as_written(self.written)
        return Verdict(self.keyword, expected, _shortened(found), self.holds_for(values))


# -- What is written ---------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_AGE = re.compile(r"(\d{1,3})([DWMY])", re.ASCII)  # PS3.5 6.2, VR AS
_YEARS_PER = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_COMPARISON = re.compile(r"(<=|>=|<|>)(.*)", re.DOTALL)
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_NUMERIC_VR = {"DS", "IS", "US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "US or SS", "AS"}
_OPAQUE_VR = {"SQ", "OB", "OW", "OD", "OF", "OL", "OV", "UN", "OB or OW", "US or OW", "US or SS or OW", "NONE", "AT"}
_PATTERN_MAX = 500  # characters
_TEXT_MAX = 1024  # characters of a value that a regex looks at: a hostile value may be gigabytes

# Elements of the patient and visit groups that describe without naming; every other element there identifies
# (PS3.15 E.1). A VR of PN always does.
_PATIENT_GROUPS = {0x0010, 0x0038}
_DESCRIBING = {
    "PatientAge",
    "PatientBodyMassIndex",
    "PatientSex",
    "PatientSexNeutered",
    "PatientSize",
    "PatientSpeciesDescription",
    "PatientWeight",
    "PregnancyStatus",
    "QualityControlSubject",
    "SmokingStatus",
}
_IDENTIFYING = {
    "ClinicalTrialSubjectID",
    "ClinicalTrialSubjectReadingID",
    "PersonAddress",
    "PersonTelecomInformation",
    "PersonTelephoneNumbers",
    "TextValue",
}


class _Mistake(Exception):
    """A condition that makes no sense; the message is the sentence for its writer."""


def _parse_conditions(written: Mapping[Any, Any]) -> tuple[dict[str, _Condition], list[tuple[str, str]]]:
    """The conditions by keyword, and every mistake as (keyword, sentence)."""
    conditions: dict[str, _Condition] = {}
    mistakes: list[tuple[str, str]] = []
    for keyword, value in written.items():
        try:
            conditions[keyword] = _parse_condition(keyword, value)
        except _Mistake as mistake:
            mistakes.append((str(keyword), str(mistake)))
    return conditions, mistakes


def _parse_condition(keyword: object, value: object) -> _Condition:
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tag = tag_for_keyword(keyword) if isinstance(keyword, str) and keyword else None
    if tag is None or not isinstance(keyword, str):
        raise _Mistake(_unknown_keyword(str(keyword)))
    vr = dictionary_VR(tag)
    if tag >> 16 in (0x0000, 0x0002):
        raise _Mistake("belongs to a command or a file's header, not to the data set: no condition can be set on it")
    if vr in _OPAQUE_VR and value is not None:
        raise _Mistake("holds a sequence or binary data; only null (absent or empty) can be asked of it")
    negated = False
    atoms: tuple[object, ...]
    if isinstance(value, list | tuple):
        if not value:
            raise _Mistake("found an empty list, which no value ever fits; expected at least one value")
        atoms = tuple(value)
        if any(isinstance(atom, str) and atom.lstrip().startswith("!") for atom in atoms):
            raise _Mistake('found a negation in a list; expected it alone, such as "!/CHEST|LUNG/"')
    else:
        atoms = (value,)
        if isinstance(value, str) and value.lstrip().startswith("!"):
            negated, atoms = True, (_negated(value),)
    tests = tuple(_parse_atom(atom, vr) for atom in atoms)
    return _Condition(
        keyword=keyword,
        tag=tag,
        written=tuple(value) if isinstance(value, list | tuple) else value,  # pyright: ignore[reportArgumentType]
        identifying=_identifies(keyword, tag, vr),
        negated=negated,
        tests=tests,
    )


def _negated(value: str) -> str | None:
    """What stands behind the negation of `!CT`, `!= CT`, `!/regex/` or `!null`."""
    rest = value.strip()[1:].removeprefix("=").strip()
    if rest.startswith("!"):
        raise _Mistake(f"found {value!r}; expected one negation")
    if _COMPARISON.match(rest):
        raise _Mistake(f"found {value!r}; expected the opposite comparison, such as '> 8' instead of '!<= 8'")
    return None if rest == "null" else rest


def _parse_atom(atom: object, vr: str) -> Test:
    if atom is None:
        return lambda values: not values
    if isinstance(atom, bool):
        raise _Mistake(f"found {str(atom).lower()}; expected a DICOM value (put a text that reads like that in quotes)")
    if isinstance(atom, int | float):
        return _parse_number(atom, vr)
    if not isinstance(atom, str):
        raise _Mistake(
            f"found a {'list in a list' if isinstance(atom, list | tuple) else 'mapping'}; "
            "expected a value, a list of values, a /regex/, a comparison or null"
        )
    text = atom.strip()
    if not text:
        raise _Mistake("found an empty text, which no value ever fits; expected null for 'absent or empty'")
    if text.startswith("/"):
        return _parse_regex(text)
    if comparison := _COMPARISON.fullmatch(text):
        return _parse_comparison(comparison[1], comparison[2].strip(), vr)
    if text.startswith("="):
        raise _Mistake(f"found {text!r}; expected the value alone where equality is meant")
    if vr in _NUMERIC_VR and _NUMBER.fullmatch(text):
        return _parse_number(float(text), vr)
    if vr in _NUMERIC_VR and not (vr == "AS" and _AGE.fullmatch(text.upper())):
        example = "an age such as 045Y or in years" if vr == "AS" else "a number"
        raise _Mistake(f"found {text!r}; expected {example}, a comparison such as '<= 8', a /regex/ or null")
    wanted = _folded(text)
    return lambda values: any(_folded(found) == wanted for found in values.texts)


def _parse_number(number: float, vr: str) -> Test:
    if not _is_finite(number):
        raise _Mistake(f"found {number}; expected a finite number")
    if vr in _NUMERIC_VR:
        return lambda values: any(found == number for found in values.numbers)
    if isinstance(number, float):
        raise _Mistake(f"holds text; expected {number} in quotes, as it is to be compared letter by letter")
    wanted = str(number)
    return lambda values: wanted in values.texts


def _parse_comparison(sign: str, text: str, vr: str) -> Test:
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise _Mistake(f"found {text!r} behind {sign!r}; expected a number, such as '{sign} 8'")
    if vr in ("UI", "PN"):
        raise _Mistake(f"holds {'UIDs' if vr == 'UI' else 'names'}, which cannot be compared with a number")
    compare, number = _COMPARE[sign], float(text)
    return lambda values: any(compare(found, number) for found in values.numbers)


def _parse_regex(text: str) -> Test:
    body, closed, flags = text[1:].rpartition("/")
    if not closed:
        raise _Mistake(f"found {_shortened(text)!r}; expected a regex to end with / or /i")
    if flags not in ("", "i"):
        raise _Mistake(f"found the regex flags {_shortened(flags)!r}; expected none or i")
    if not body or len(body) > _PATTERN_MAX:
        raise _Mistake(f"found a regex of {len(body)} characters; expected 1 to {_PATTERN_MAX}")
    try:
        pattern = re.compile(body, re.IGNORECASE if flags else 0)
    except (re.error, OverflowError, RecursionError) as error:
        raise _Mistake(f"found the regex {_shortened(text)!r}, which cannot be read ({error})") from None
    return lambda values: any(pattern.search(found[:_TEXT_MAX]) is not None for found in values.texts)


def _unknown_keyword(keyword: str) -> str:
    from pydicom.datadict import keyword_dict

    by_folded = {known.lower(): known for known in keyword_dict if known}
    near = difflib.get_close_matches(keyword.strip().lower(), by_folded, n=1, cutoff=0.6)
    hint = f"; did you mean {by_folded[near[0]]}?" if near else "; expected one of PS3.6, such as Modality"
    return f"is not a DICOM keyword{hint}"


def _identifies(keyword: str, tag: int, vr: str) -> bool:
    """Whether the element's value may tell who the patient (or another person) is."""
    return keyword in _IDENTIFYING or vr == "PN" or (tag >> 16 in _PATIENT_GROUPS and keyword not in _DESCRIBING)


def _as_written(written: Written) -> str:
    if isinstance(written, tuple):
        texts = [_as_written(atom) for atom in written]
        return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
    return "null" if written is None else _printable(str(written))


# -- What is found -----------------------------------------------------------------------------------------------------


def _values_of(dataset: Dataset, tag: int) -> _Values:
    """The element's values; one that pydicom cannot decode counts as the text that stands in its bytes."""
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import RawDataElement
    from pydicom.errors import BytesLengthException

    if tag not in dataset:
        return _Values((), ())
    raw = dataset.get_item(tag, keep_deferred=True)
    vr = dictionary_VR(tag) if raw.VR in (None, "UN") else raw.VR
    if vr in _OPAQUE_VR:  # never decoded: only its presence can be asked, and it may be huge or broken
        is_empty = raw.length == 0 if isinstance(raw, RawDataElement) else raw.is_empty
        return _Values(() if is_empty else ("present",), ())
    value: object
    try:
        value = dataset[tag].value
    except (
        *(ValueError, TypeError, ArithmeticError, LookupError, AttributeError),
        *(NotImplementedError, struct.error, BytesLengthException),
    ):
        value = raw.value.decode("latin-1").split("\\") if isinstance(raw.value, bytes) else raw.value
    # A PersonName and a bytes value are one value, although they iterate.
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = tuple(text for item in items if (text := str("" if item is None else item).strip(" \t\r\n\0")))
    return _Values(texts, tuple(number for text in texts if (number := _number(text)) is not None))


def _number(text: str) -> float | None:
    if _NUMBER.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else None
    if age := _AGE.fullmatch(text.upper()):
        return int(age[1]) * _YEARS_PER[age[2]]
    return None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _folded(text: str) -> str:
    return text.strip().casefold()


def _printable(text: str) -> str:
    """The text without what could steer a terminal: control characters become a replacement character."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _shortened(text: str, length: int = 64) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
