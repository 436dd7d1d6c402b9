"""The configuration file with a pin more or less, and every other character as its writer left it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.commands.pinning import CannotEdit, write_pin
from node.config import load_config

A, B = "a" * 64, "b" * 64
HEAD = "# the node of ward 5\nnode: {port: 11112, storage: ./var}   # disk\n"
TAIL = "# who runs what\nroutes:\n  - name: chest   # all of it\n    when: {Modality: CT}\n    run: [lung]\n"

# The section as it is written, and as it is with lung pinned to B.
ADDED = [
    ("models: {path: models}   # here\n", "models: {path: models, trusted: {lung: B}}   # here\n"),
    ("models: { path: [a, b] , }\n", "models: { path: [a, b], trusted: {lung: B} , }\n"),
    ("models: {path: models, trusted: {}}\n", "models: {path: models, trusted: {lung: B}}\n"),
    ("models: {path: models, trusted: { spleen: A } }\n", "models: {path: models, trusted: { spleen: A, lung: B } }\n"),
    ("models: {path: m, trusted: {lung: A, spleen: A}}\n", "models: {path: m, trusted: {lung: B, spleen: A}}\n"),
    ("models: {trusted: {lung: 'A'}, path: models}\n", "models: {trusted: {lung: B}, path: models}\n"),
    ("models:\n  path: models   # here\n\n", "models:\n  path: models   # here\n  trusted:\n    lung: B\n\n"),
    ("models:\n    path:\n      - a\n      - b  # last\n# end\n",
     "models:\n    path:\n      - a\n      - b  # last\n    trusted:\n        lung: B\n# end\n"),
    ("models:\n  trusted:\n    # of the vendor\n    spleen: A  # 2026\n  path: models\n",
     "models:\n  trusted:\n    # of the vendor\n    spleen: A  # 2026\n    lung: B\n  path: models\n"),
    ("models:\n  path: m\n  trusted:\n    lung: A   # old\n", "models:\n  path: m\n  trusted:\n    lung: B   # old\n"),
    ("models:\n  path: m\n  trusted: {spleen: A}  # x\n", "models:\n  path: m\n  trusted: {spleen: A, lung: B}  # x\n"),
    ("models:\n  path: models\n  trusted: {\n    spleen: A,\n  }\n",
     "models:\n  path: models\n  trusted: {\n    spleen: A, lung: B,\n  }\n"),
    ("models:\r\n  path: models\r\n", "models:\r\n  path: models\r\n  trusted:\r\n    lung: B\r\n"),
]  # fmt: skip
# ... and as it is after lung is no longer pinned.
REMOVED = [
    ("models: {path: models, trusted: {lung: B}}   # here\n", "models: {path: models}   # here\n"),
    ("models: {trusted: {lung: B}, path: models}\n", "models: {path: models}\n"),
    ("models: {path: m, trusted: {lung: B, spleen: A}}\n", "models: {path: m, trusted: {spleen: A}}\n"),
    ("models: {path: m, trusted: {spleen: A, lung: B}}\n", "models: {path: m, trusted: {spleen: A}}\n"),
    ("models:\n  path: m  # x\n  trusted:\n    lung: B  # y\n# z\n", "models:\n  path: m  # x\n# z\n"),
    ("models:\n  path: m\n  trusted:\n    lung: B\n    # vendor\n    spleen: A\n",
     "models:\n  path: m\n  trusted:\n    # vendor\n    spleen: A\n"),
    ("models:\n  trusted:\n    spleen: A\n    lung: B\n  path: m\n", "models:\n  trusted:\n    spleen: A\n  path: m\n"),
    ("models:\n  trusted: {lung: B}\n  path: m\n", "models:\n  path: m\n"),
]  # fmt: skip


def written(text: str) -> str:
    return text.replace(" A", f" {A}").replace("'A'", f"'{A}'").replace(" B", f" {B}")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(("before", "after"), ADDED)
@pytest.mark.parametrize("tail", [TAIL, ""])
def test_pin_is_written(config: Path, before: str, after: str, tail: str) -> None:
    config.write_bytes((HEAD + written(before) + tail).encode())
    old = load_config(config)
    write_pin(config, "lung", B)
    assert config.read_bytes().decode() == HEAD + written(after) + tail
    new = load_config(config)
    assert new.models.trusted == {**old.models.trusted, "lung": B}
    assert new.model_dump(exclude={"models"}) == old.model_dump(exclude={"models"})
    assert os.listdir(config.parent) == ["config.yaml"]


@pytest.mark.parametrize(("before", "after"), REMOVED)
@pytest.mark.parametrize("tail", [TAIL, ""])
def test_pin_is_taken_away(config: Path, before: str, after: str, tail: str) -> None:
    config.write_text(HEAD + written(before) + tail)
    write_pin(config, "lung", None)
    assert config.read_text() == HEAD + written(after) + tail
    assert "lung" not in load_config(config).models.trusted


def test_file_without_a_last_newline(config: Path) -> None:
    config.write_text("node: {storage: var}\nmodels:\n  path: models")
    write_pin(config, "lung", B)
    assert config.read_text() == f"node: {{storage: var}}\nmodels:\n  path: models\n  trusted:\n    lung: {B}\n"


UNUSUAL = [
    '"models": {path: |\n    x}\n',
    "models:\n  path: >\n    models\n",
    "models: {path: models, trusted: {'lung': >\n  x}}\n",
]


@pytest.mark.parametrize("text", ["models: {path: models}\nnode: {prot: 1}\n", *UNUSUAL])
def test_what_cannot_be_edited_is_left_alone(config: Path, text: str) -> None:
    config.write_text(text if "node" in text else HEAD + text)
    before = config.read_bytes()
    with pytest.raises(CannotEdit):
        write_pin(config, "lung", B)
    assert config.read_bytes() == before
    assert os.listdir(config.parent) == ["config.yaml"]


def test_mode_owner_and_link_stay(config: Path, tmp_path: Path) -> None:
    real = tmp_path / "etc" / "radnode.yaml"
    real.parent.mkdir()
    real.write_text(HEAD + "models: {path: models}\n")
    real.chmod(0o640)
    os.chown(real, os.getuid(), os.getgid())
    config.symlink_to(real)
    write_pin(config, "lung", B)
    assert config.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert load_config(config).models.trusted == {"lung": B}


def test_file_that_may_not_be_written_is_left_alone(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(HEAD + "models: {path: models}\n")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(CannotEdit, match="is not writable for this user"):
        write_pin(config, "lung", B)
    assert "trusted" not in config.read_text()


def test_change_by_someone_else_is_not_lost(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(HEAD + "models: {path: models}\n")

    def load_and_change(path: Path) -> object:
        config.write_text(HEAD + "models: {path: elsewhere}\n")
        return load_config(path)

    monkeypatch.setattr("node.commands.pinning.load_config", load_and_change)
    with pytest.raises(CannotEdit, match="was changed by someone else"):
        write_pin(config, "lung", B)
    assert config.read_text() == HEAD + "models: {path: elsewhere}\n"


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.dictionaries(NAMES, DIGESTS, max_size=4), NAMES, DIGESTS, st.sampled_from(["flow", "block", "mixed"]))
def test_what_is_pinned_and_unpinned_is_as_before(
    tmp_path_factory: pytest.TempPathFactory, pins: dict[str, str], name: str, digest: str, shape: str
) -> None:
    pins.pop(name, None)
    if not all(load_as_text(value) for value in [*pins.values(), digest]):
        return
    entries = ", ".join(f"{key}: {value}" for key, value in pins.items())
    if shape == "flow":
        section = f"models: {{path: m{', trusted: {' + entries + '}' if pins else ''}}}  # c\n"
    elif shape == "mixed":
        section = f"models:\n  path: m\n{'  trusted: {' + entries + '}  # c' + chr(10) if pins else ''}"
    else:
        lines = "".join(f"    {key}: {value}  # c\n" for key, value in pins.items())
        section = f"models:\n  path: m\n{'  trusted:' + chr(10) + lines if pins else ''}"
    config = tmp_path_factory.mktemp("pins") / "config.yaml"
    config.write_text(HEAD + section + TAIL)
    write_pin(config, name, digest)
    assert load_config(config).models.trusted == pins | {name: digest}
    write_pin(config, name, None)
    assert config.read_text() == HEAD + section + TAIL


def load_as_text(digest: str) -> bool:
    """Whether YAML takes the digits for text: not for a number such as 12e34."""
    return sum(digest.count(letter) for letter in "abcdf") > 0
