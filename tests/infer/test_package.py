"""Model packages: read, found and pinned without running any of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from node.dicom.codes import Code
from node.errors import ManifestError, ModelError
from node.infer.manifest import Measurement, Rank
from node.infer.package import check_trusted, digest_package, discover_packages, find_package, load_package

MANIFEST = """\
title: CT lungs, reference
intended_use: Research only.
licence_code: Apache-2.0
licence_weights: none
inputs:
  image:
    when: {Modality: CT, ImageType: "!LOCALIZER"}
    rank: [thinnest, newest]
    limits: {slices_min: 20, spacing_max_mm: 8}
overrides: {inferer#overlap: 0.25}
segments:
  1:
    name: Left lung
    category: [SCT, 91723000, Anatomical Structure]
    type: [SCT, 39607008, Lung]
    laterality: left
    color_cielab: [70, 10, -20.5]
  2: {name: Right lung, type: [SCT, "39607008", Lung], laterality: right}
measurements: [volume, mean, standard deviation]
timeout_s: 600
"""

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a package in `models/` and gives its folder."""

    def build_package(name: str = "ct_lung", *, manifest: str = MANIFEST, models: str = "models") -> Path:
        folder = tmp_path / models / name
        (folder / "configs").mkdir(parents=True)
        (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0"}))
        (folder / "configs" / "inference.json").write_text("{}")
        (folder / "scripts").mkdir()
        (folder / "scripts" / "lungs.py").write_text("raise RuntimeError('reading a package must not run it')\n")
        (folder / "dicom.yaml").write_text(manifest)
        return folder

    return build_package


def test_package_is_read_as_typed_values(build: Build) -> None:
    folder = build()
    package = load_package(folder)
    assert (package.name, package.folder, package.version) == ("ct_lung", folder, "0.1.0")
    assert package.digest == digest_package(folder)
    manifest = package.manifest
    assert manifest.inputs["image"].rank == (Rank.THINNEST, Rank.NEWEST)
    assert manifest.inputs["image"].when["ImageType"] == "!LOCALIZER"
    assert manifest.inputs["image"].limits.spacing_max_mm == 8
    assert manifest.segments[1].type == Code("SCT", "39607008", "Lung")
    assert isinstance(manifest.segments[1].type, Code)
    assert manifest.segments[1].color_cielab == (70, 10, -20.5)
    assert manifest.segments[2].category == Code("SCT", "91723000", "Anatomical Structure")
    assert manifest.measurements == (Measurement.VOLUME, Measurement.MEAN, Measurement.STANDARD_DEVIATION)
    assert manifest.overrides == {"inferer#overlap": 0.25}
    assert manifest.label_names == {1: "Left lung", 2: "Right lung"}


MISTAKES = [
    ("title: CT lungs, reference\n", "", 1, "title", "is missing; expected a value"),
    ("licence_code: Apache-2.0\n", "licence_code: Apache-2.0\nlicense_code: x\n", 4, "license_code",
     "is not a known field; did you mean licence_code?"),
    ("Modality: CT", "Modallity: CT", 7, "inputs.image.when.Modallity",
     "is not a DICOM keyword; did you mean Modality?"),
    ("rank: [thinnest, newest]", "rank: [thinnest, thickest]", 8, "inputs.image.rank[1]",
     "found 'thickest'; expected 'thinnest', 'softest kernel', 'most slices' or 'newest'"),
    ("slices_min: 20", "slices_min: 0", 9, "inputs.image.limits.slices_min",
     "found the number 0; expected a number of at least 1"),
    ("spacing_max_mm: 8", "spacing_max: 8", 9, "inputs.image.limits.spacing_max",
     "is not a known field; did you mean spacing_max_mm?"),
    ("type: [SCT, 39607008, Lung]", "type: [SCT, 39607008]", 15, "segments.1.type",
     "found 2 items; expected [scheme, value, meaning], such as [SCT, 39607008, Lung]"),
    ("type: [SCT, 39607008, Lung]", "type: 39607008", 15, "segments.1.type",
     "found 39607008; expected [scheme, value, meaning], such as [SCT, 39607008, Lung]"),
    ("type: [SCT, 39607008, Lung]", "type: [SCT, 12345678901234567, Lung]", 15, "segments.1.type",
     "found '12345678901234567' as the code's value; expected 1 to 16 characters without a backslash"),
    ("type: [SCT, 39607008, Lung]", "type: [99X, 1.10, Lung]", 15, "segments.1.type",
     "found a part that is not text; expected [scheme, value, meaning], such as [SCT, 39607008, Lung], "
     "with quotes where a part could be read as a number"),
    ("laterality: left", "laterality: links", 16, "segments.1.laterality",
     "found 'links'; expected 'left', 'right', 'both' or 'unpaired'"),
    ("color_cielab: [70, 10, -20.5]", "color_cielab: [70, 10, -200]", 17, "segments.1.color_cielab[2]",
     "found the number -200; expected a number of at least -128"),
    ("  2: {", "  0: {", 18, "segments.0", "found the name '0'; expected a number of at least 1"),
    ("measurements: [volume, mean,", "measurements: [weight, mean,", 19, "measurements[0]",
     "found 'weight'; expected 'volume', 'mesh volume', 'surface area', 'area', 'longest diameter', "
     "'perpendicular diameter', 'maximum 3D diameter', 'mean', 'standard deviation', 'minimum', 'percentile 5', "
     "'percentile 10', 'percentile 25', 'median', 'percentile 75', 'percentile 90', 'percentile 95' or 'maximum'"),
    ("timeout_s: 600", "timeout_s: 10m", 20, "timeout_s", "found '10m'; expected a number"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "line", "field", "message"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistake_in_the_manifest(*, build: Build, before: str, after: str, line: int, field: str, message: str) -> None:
    assert MANIFEST.count(before) == 1
    folder = build(manifest=MANIFEST.replace(before, after))
    with pytest.raises(ManifestError) as refusal:
        load_package(folder)
    (problem,) = refusal.value.problems
    assert (problem.file, problem.line, problem.field) == (folder / "dicom.yaml", line, field)
    assert problem.message == message


NETWORK = "adapter: torchscript\nversion: '1'\nnetwork: {file: models/a.ts}\n"
PROGRAM = "adapter: command\nversion: '1'\ncommand: {run: [a]}\n"
SENSELESS = [
    ("image: {kind: image, orientation: RAS}", "", "orientation means nothing for an input of kind image"),
    ("image: {kind: image, spacing_mm: [1, 1, 1]}", "", "spacing_mm means nothing for an input of kind image"),
    (
        "image: {kind: image, rgb: true}\n  b: {kind: image, onto_first: true}",
        "",
        "onto_first means nothing for an input",
    ),
    ("image: {rgb: true}", "", "rgb means nothing for an input of kind volume"),
    ("image: {onto_first: true}", "", "inputs.image.onto_first means nothing: it is the first input"),
    ("a: {}\n  b: {registered: true}", "", "registered means nothing without onto_first: true"),
    ("a: {kind: image}\n  b: {onto_first: true}", "", "inputs.b.onto_first needs a first input of kind volume"),
    ("a: {}\n  b: {}", "data: {image: a}\n", "data gives the input 'b' to nobody"),
    ("image: {spacing_mm: [1, 1, 1]}", NETWORK, "does not read it; see network.spacing_mm"),
    ("image: {orientation: RAS}", NETWORK, "does not read it; see network.orientation"),
    ("image: {}", NETWORK + "activation: sigmoid\n", "activation: of bundles only"),
    ("image: {}", NETWORK + "background: [4]\n", "background: of bundles only"),
    ("a: {}\n  b: {onto_first: true}", PROGRAM, "inputs.b.onto_first: the adapter command does not read it"),
    ("image: {kind: image}", PROGRAM, "a segmentation by the adapter command needs a first input of kind volume"),
    ("image: {kind: image}", "adapter: nnunet\nversion: '1'\n", "needs a first input of kind volume"),
]


@pytest.mark.parametrize(("inputs", "more", "sentence"), SENSELESS, ids=[case[2] for case in SENSELESS])
def test_manifest_that_would_be_passed_over_in_silence(build: Build, inputs: str, more: str, sentence: str) -> None:
    """Whatever a manifest says and nobody reads is a model that sees something else than its package says."""
    start, end = MANIFEST.index("  image:\n"), MANIFEST.index("overrides:")
    rest = MANIFEST[end:].replace("overrides: {inferer#overlap: 0.25}\n", "")
    folder = build(manifest=f"{MANIFEST[:start]}  {inputs}\n{more}{rest}")
    with pytest.raises(ManifestError) as refusal:
        load_package(folder)
    assert sentence in str(refusal.value)


def test_what_is_no_package(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load_package(tmp_path / "absent")
    with pytest.raises(ModelError, match="rename it to 1 to 64 letters"):
        load_package(build("ct lung"))
    folder = build("a")
    (folder / "dicom.yaml").unlink()
    with pytest.raises(ModelError, match=r"dicom\.yaml is missing"):
        load_package(folder)
    folder = build("b")
    (folder / "configs" / "inference.yaml").write_text("{}")
    with pytest.raises(ModelError, match=r"found configs/inference\.json and configs/inference\.yaml"):
        load_package(folder)
    (folder / "configs" / "inference.yaml").unlink()
    (folder / "configs" / "inference.json").unlink()
    with pytest.raises(ModelError, match="found none"):
        load_package(folder)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "gives no version"),
        ('{"version": 1}', "gives no version"),
        ("[" * 99999, "is not JSON"),
    ],
)
def test_metadata_without_a_version(build: Build, metadata: str, sentence: str) -> None:
    folder = build()
    (folder / "configs" / "metadata.json").write_text(metadata)
    with pytest.raises(ModelError, match=sentence):
        load_package(folder)
    (folder / "configs" / "metadata.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_package(folder)


def test_digest_is_that_of_sha256sum(build: Build) -> None:
    folder = build()
    (folder / "models").mkdir()
    (folder / "models" / "modèle.pt").write_bytes(bytes(range(256)) * 10)
    (folder / "models-old").write_text("sorts before models/ in some locales")
    (folder / "scripts" / "__pycache__").mkdir()
    (folder / "scripts" / "__pycache__" / "lungs.cpython-311.pyc").write_bytes(b"x")
    (folder / ".gitignore").write_text("x")
    command = (
        "find . -type d \\( -name __pycache__ -o -name '.git*' \\) -prune -o ! -type d ! -name __pycache__ "
        "! -name '.git*' -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    )
    assert command in (Path(__file__).parents[2] / "docs" / "models.md").read_text(), "the documentation differs"
    ran = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    assert digest_package(folder) == ran.stdout.split()[0]


def test_digest_changes_with_every_file_and_with_nothing_else(build: Build, tmp_path: Path) -> None:
    folder = build()
    digest = digest_package(folder)
    copied = shutil.copytree(folder, tmp_path / "elsewhere" / "other_name")
    os.utime(copied / "dicom.yaml", (1, 1))
    (copied / "empty").mkdir()
    assert digest_package(copied) == digest
    for path in sorted(path for path in copied.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        assert digest_package(copied) != digest, path
        path.write_bytes(content)
        path.rename(path.with_name("renamed"))
        assert digest_package(copied) != digest, path
        path.with_name("renamed").rename(path)
    (copied / "scripts" / "added.py").touch()
    assert digest_package(copied) != digest


def test_digest_refuses_what_it_could_not_cover(build: Build, tmp_path: Path) -> None:
    folder = build()
    (tmp_path / "outside").mkdir()
    (folder / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="linked is a link to a folder"):
        digest_package(folder)
    (folder / "linked").unlink()
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="broken is a broken link"):
        digest_package(folder)
    (folder / "broken").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ModelError, match="pipe is a broken link or not a file"):
        digest_package(folder)
    (folder / "pipe").unlink()
    (folder / "two\nlines").touch()
    with pytest.raises(ModelError, match="odd characters"):
        digest_package(folder)


def test_a_linked_file_of_the_package_counts_by_its_content(build: Build) -> None:
    folder = build()
    (folder / "weights").write_bytes(b"1")
    (folder / "model.pt").symlink_to("weights")
    digest = digest_package(folder)
    (folder / "weights").write_bytes(b"2")
    assert digest_package(folder) != digest


@pytest.mark.parametrize("target", ["/etc/hostname", "../weights", "docs/../../weights"])
def test_a_link_that_leads_out_of_the_package_is_refused_by_name(build: Build, target: str) -> None:
    """A model may read its package: a link would show it whatever the node's user can read."""
    folder = build()
    (folder / "docs").mkdir(exist_ok=True)
    (folder.parent / "weights").write_bytes(b"1")
    (folder / "docs" / "model.pt").symlink_to(target if target.startswith("/") else f"../{target}")
    with pytest.raises(ModelError, match=r"docs/model\.pt is a link that leads out of the package; copy the file"):
        load_package(folder)


def test_changed_package_is_not_the_trusted_one(build: Build) -> None:
    folder = build()
    package = load_package(folder)
    check_trusted(package, {})
    check_trusted(package, {"another": "0" * 64})
    check_trusted(package, {"ct_lung": package.digest})
    (folder / "scripts" / "lungs.py").write_text("pass\n")
    changed = load_package(folder)
    with pytest.raises(ModelError) as refusal:
        check_trusted(changed, {"ct_lung": package.digest})
    assert f"expected the digest {package.digest}, found {changed.digest}" in str(refusal.value)
    assert "ct_lung" in str(refusal.value)


def test_discovery_gives_packages_and_what_is_wrong_with_the_others(build: Build, tmp_path: Path) -> None:
    build("b_good")
    build("a_good", models="more")
    build("b_good", models="more")
    build("c_wrong", manifest=MANIFEST.replace("slices_min: 20", "slices_min: 0"))
    (build("d_bare") / "dicom.yaml").unlink()
    (tmp_path / "models" / "no_package").mkdir()
    (tmp_path / "models" / "README.md").touch()
    packages, errors = discover_packages([tmp_path / "models", tmp_path / "more", tmp_path / "absent"])
    assert [(package.name, package.folder.parent.name) for package in packages] == [
        ("a_good", "more"),
        ("b_good", "models"),
    ]
    assert [type(error) for error in errors] == [ManifestError, ModelError, ModelError, ModelError]
    assert "c_wrong/dicom.yaml:9: inputs.image.limits.slices_min: found the number 0" in str(errors[0])
    assert "d_bare" in str(errors[1])
    assert "is never used" in str(errors[2])
    assert "there is no folder" in str(errors[3])


def test_package_is_found_by_name_or_what_there_is_is_named(build: Build, tmp_path: Path) -> None:
    build("ct_lung")
    build("mr_brain", models="more")
    paths = [tmp_path / "models", tmp_path / "more"]
    assert find_package("mr_brain", paths).folder == tmp_path / "more" / "mr_brain"
    with pytest.raises(ModelError) as refusal:
        find_package("ct_lungs", paths)
    assert str(refusal.value) == (
        f"no model package 'ct_lungs'; there are ct_lung, mr_brain in {tmp_path / 'models'}, {tmp_path / 'more'}"
    )
    for name in ("../models/ct_lung", str(tmp_path / "models" / "ct_lung"), "", "."):
        with pytest.raises(ModelError, match="no model package"):
            find_package(name, paths)
    with pytest.raises(ModelError, match="there are no packages in"):
        find_package("ct_lung", [tmp_path / "absent"])


def test_reading_a_package_imports_nothing_that_runs_models(build: Build) -> None:
    folder = build()
    code = (
        "import sys; from pathlib import Path; from node.infer.package import load_package; "
        f"load_package(Path({str(folder)!r})); "
        "print([name for name in ('torch', 'monai', 'SimpleITK', 'lungs') if name in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert ran.stdout.strip() == "[]"
