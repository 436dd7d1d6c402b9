"""`radnode models add|show|verify|pin|unpin` from the command line, against a web server of the test's own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest

from node.cli import main
from node.config import load_config
from node.infer.package import load_package
from tests.dicom.slices import write_series
from tests.infer.site import Site
from tests.infer.tiny import MANIFEST, bundle_files, weights, write, zipped

Radnode = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def config(tmp_path: Path, site: Site) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"node: {{storage: ./var}}  # ours\nmodels:\n  path: models  # theirs\n  zoo: {site.url}/model_info.json\n"
    )
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "dicom.yaml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def radnode(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Radnode:
    """Runs `radnode models ...` in this process: exit code, output, errors."""
    monkeypatch.chdir(config.parent)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["models", *map(str, arguments), "--config", str(config)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def publish(site: Site, name: str, version: str, content: bytes) -> None:
    """Put a bundle into the zoo of this site."""
    page = site.pages.get("/model_info.json")
    index = json.loads(page.body) if page else {}
    url = site.put(f"/files/{name}_v{version}.zip", content)
    index[f"{name}_v{version}"] = {"checksum": hashlib.sha1(content).hexdigest(), "source": url}
    site.put("/model_info.json", json.dumps(index).encode())


def test_from_the_zoo_to_a_segmentation(site: Site, config: Path, manifest: Path, models: Path, tmp_path: Path) -> None:
    """As an administrator does it: add, pin, verify, run. The weights come as a large file, over a broken line."""
    content = weights()
    large = f"large_files:\n- path: models/model.pt\n  url: '{site.put('/model.pt', content, cuts=[300])}'\n"
    large += f"  hash_val: '{hashlib.md5(content).hexdigest()}'\n  hash_type: md5\n"
    files = bundle_files("0.2.0", limit=None) | {"large_files.yml": large.encode()}
    publish(site, "marker", "0.1.0", b"the old one, never asked for")
    publish(site, "marker", "0.2.0", zipped(files, "marker"))
    site.pages["/files/marker_v0.2.0.zip"].cuts = [1000]

    def radnode(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "node.cli", *arguments, "--config", str(config)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path, env=environment
        )

    added = radnode("models", "add", "marker", "--dicom-yaml", str(manifest))
    assert added.returncode == 0, added.stderr
    assert "marker 0.2.0 of the model zoo" in added.stdout
    assert "licence of the weights: Apache-2.0" in added.stdout
    assert re.search(r"^marker_v0\.2\.0\.zip: [\d.]+ of [\d.]+ MB$", added.stderr, re.MULTILINE)
    assert site.ranges_asked("/files/marker_v0.2.0.zip") == [None, "bytes=1000-"]
    assert site.ranges_asked("/model.pt") == [None, "bytes=300-"]
    package = load_package(models / "marker")
    assert package.version == "0.2.0"
    assert load_config(config).models.trusted == {"marker": package.digest}
    assert config.read_text().startswith("node: {storage: ./var}  # ours\nmodels:\n  path: models  # theirs\n")
    assert sorted(os.listdir(models)) == [".trusted", "marker"]

    verified = radnode("models", "verify", "--weights")
    assert verified.returncode == 0, verified.stdout
    assert "marker 0.2.0: good\n  digest as pinned\n  models/model.pt: 1 tensors" in verified.stdout

    array = np.zeros((6, 8, 10), np.int16)
    array[1:4, 2:5, 3:9] = 900
    write_series(tmp_path / "study", array)
    ran = radnode("run", "study", "--model", "marker", "--out", "results", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    (seg,) = (tmp_path / "results").glob("seg*.dcm")
    assert hd.seg.segread(seg).get_volume().array.sum() == 3 * 3 * 6


def test_newest_and_other_versions(radnode: Radnode, site: Site, manifest: Path, models: Path) -> None:
    for version in ("0.9.0", "0.10.0"):
        publish(site, "marker", version, zipped(bundle_files(version), "marker"))
    assert radnode("add", "marker", "--dicom-yaml", manifest)[0] == 0
    assert load_package(models / "marker").version == "0.10.0"
    assert radnode("add", "marker@0.9.0", "--dicom-yaml", manifest, "--name", "older")[0] == 0
    assert load_package(models / "older").version == "0.9.0"


def test_shipped_manifest_is_taken(
    radnode: Radnode, site: Site, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "shipped", {"zoo/marker/dicom.yaml": MANIFEST.encode()})
    monkeypatch.setattr("node.commands.models_add.shipped_models", lambda: (tmp_path / "shipped",))
    publish(site, "marker", "0.1.0", zipped(bundle_files()))
    assert radnode("add", "marker", "--name", "brightness")[0] == 0
    assert load_package(models / "brightness").manifest.title == "Marker"


@pytest.mark.parametrize("kind", ["folder", "zip", "address", "address with a checksum"])
def test_other_sources(radnode: Radnode, site: Site, models: Path, tmp_path: Path, kind: str) -> None:
    files = bundle_files() | {"dicom.yaml": MANIFEST.encode()}
    content = zipped(files, "anything")
    (tmp_path / "marker_v0.1.0.zip").write_bytes(content)
    arguments = {
        "folder": [write(tmp_path / "from" / "marker", files)],
        "zip": [tmp_path / "marker_v0.1.0.zip", "--sha256", hashlib.sha256(content).hexdigest()],
        "address": [site.put("/a/marker_v0.1.0.zip", content) + "?token=5"],
        "address with a checksum": [site.url + "/a/marker_v0.1.0.zip", "--sha256", hashlib.sha256(content).hexdigest()],
    }[kind]
    code, out, _ = radnode("add", *arguments)
    assert code == 0
    assert f"marker 0.1.0 is in {models / 'marker'}: Marker" in out
    assert sorted(os.listdir(models)) == [".trusted", "marker"]


REFUSED = [
    ("damaged", {"checksum": True}, "is damaged or another file: its sha1 is"),
    ("bomb", {"files": {"models/model.pt": bytes(90_000_000)}}, r"http://\S+/files/marker_v0.1.0.zip unpacks from"),
    ("no manifest", {}, r"marker comes without a dicom.yaml, and radnode has none for a bundle of that name"),
    ("not SHA-256", {"sha256": "0" * 64}, "its sha256 is"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "how", "sentence"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_source_leaves_nothing(
    *, radnode: Radnode, site: Site, config: Path, models: Path, what: str, how: dict, sentence: str
) -> None:
    content = zipped(bundle_files() | how.get("files", {}))
    publish(site, "marker", "0.1.0", content)
    if "checksum" in how:
        site.put("/files/marker_v0.1.0.zip", content[:-1] + b"x")
    before = config.read_text()
    code, _, err = radnode("add", "marker", *(["--sha256", how["sha256"]] if "sha256" in how else []))
    assert code == 1
    assert re.search(sentence, err), what
    assert "Traceback" not in err
    assert config.read_text() == before
    kept = [".downloads"] if what == "no manifest" else []  # the bundle itself was good
    assert os.listdir(models) == kept


def test_good_download_is_not_fetched_again_for_its_manifest(radnode: Radnode, site: Site, manifest: Path) -> None:
    publish(site, "marker", "0.1.0", zipped(bundle_files()))
    assert radnode("add", "marker")[0] == 1
    assert radnode("add", "marker", "--dicom-yaml", manifest)[0] == 0
    assert len(site.ranges_asked("/files/marker_v0.1.0.zip")) == 1


@pytest.mark.parametrize("source", ["nothing/here", "marker.zip", "file:///etc/passwd", "ftp://127.0.0.1/marker.zip"])
def test_source_that_is_none(radnode: Radnode, models: Path, source: str) -> None:
    code, _, err = radnode("add", source)
    assert code == 1
    assert "there is no " in err or "is not an address that begins with https:// or http://" in err
    assert not models.exists() or os.listdir(models) == []


def test_existing_package_is_kept_until_the_new_one_is_good(
    radnode: Radnode, config: Path, models: Path, tmp_path: Path
) -> None:
    old, new = bundle_files("0.1.0"), bundle_files("0.2.0")
    one = write(tmp_path / "one" / "marker", old | {"dicom.yaml": MANIFEST.encode()})
    two = write(tmp_path / "two" / "marker", new)
    assert radnode("add", one)[0] == 0
    code, _, err = radnode("add", two)
    assert code == 1
    assert "there is already" in err
    code, _, err = radnode("add", two, "--replace")
    assert "comes without a dicom.yaml" in err
    assert load_package(models / "marker").version == "0.1.0"
    write(two, {"dicom.yaml": MANIFEST.encode()})
    assert radnode("add", two, "--replace")[0] == 0
    package = load_package(models / "marker")
    assert package.version == "0.2.0"
    assert load_config(config).models.trusted == {"marker": package.digest}


def test_name_that_another_folder_of_the_path_has(radnode: Radnode, config: Path, tmp_path: Path) -> None:
    files = bundle_files() | {"dicom.yaml": MANIFEST.encode()}
    write(tmp_path / "vendor" / "marker", files)
    config.write_text("node: {storage: ./var}\nmodels: {path: [models, vendor]}\n")
    code, _, err = radnode("add", write(tmp_path / "from" / "marker", files))
    assert code == 1
    assert f"there is already {tmp_path / 'vendor' / 'marker'}" in err


def test_folder_that_is_not_on_the_path_is_not_pinned(radnode: Radnode, config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "from" / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    code, out, _ = radnode("add", source, "--into", tmp_path / "elsewhere")
    assert code == 0
    assert f"{tmp_path / 'elsewhere'} is not on models.path" in out
    assert load_config(config).models.trusted == {}
    assert load_package(tmp_path / "elsewhere" / "marker").name == "marker"


def test_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RADNODE_CONFIG", raising=False)
    monkeypatch.setattr("node.config.SYSTEM_CONFIG", tmp_path / "none.yaml")
    source = write(tmp_path / "from" / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    assert main(["models", "add", str(source)]) == 0
    assert f"the digest is {load_package(tmp_path / 'models' / 'marker').digest}" in capsys.readouterr().out
    assert main(["models", "show", "marker"]) == 0
    assert main(["models", "add", str(source), "--config", "missing.yaml"]) == 1
    monkeypatch.setenv("RADNODE_CONFIG", "missing.yaml")
    assert main(["models", "show", "marker"]) == 1


# -- Pins --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(radnode: Radnode, models: Path, tmp_path: Path) -> Path:
    """The folder of a package that was added and pinned."""
    source = write(tmp_path / "from" / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    assert radnode("add", source)[0] == 0
    return models / "marker"


def test_hashes_are_those_that_sha256sum_checks(pinned: Path, config: Path) -> None:
    kept = pinned.parent / ".trusted" / "marker.sha256"
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == load_config(config).models.trusted["marker"]
    done = subprocess.run(["sha256sum", "-c", "--quiet", kept], cwd=pinned, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_changed_package_is_refused_and_says_which_files(radnode: Radnode, pinned: Path) -> None:
    (pinned / "scripts" / "net.py").write_text("import os")
    (pinned / "scripts" / "extra.py").touch()
    (pinned / "LICENSE").unlink()
    code, out, _ = radnode("verify", "marker")
    assert code == 1
    assert "pins: changed scripts/net.py, added scripts/extra.py, missing LICENSE (expected the digest" in out
    done = radnode("verify", "--json")
    (model,) = json.loads(done[1])["models"]
    assert model["remarks"][0]["verdict"] == "wrong"


def test_kept_hashes_that_were_changed_too_are_not_believed(radnode: Radnode, pinned: Path) -> None:
    """Whoever changes a file and the list cannot blame another file: the list counts by the pinned digest."""
    kept = pinned.parent / ".trusted" / "marker.sha256"
    (pinned / "scripts" / "net.py").write_text("import os")
    kept.write_text(kept.read_text().replace("LICENSE", "LICENCE"))
    code, out, _ = radnode("verify", "marker")
    assert code == 1
    assert "is not the one that models.trusted pins (expected the digest" in out


def test_pin_again_and_unpin(radnode: Radnode, config: Path, pinned: Path) -> None:
    before = config.read_text()
    (pinned / "README").touch()
    code, out, _ = radnode("pin", "marker")
    assert code == 0
    assert "marker was pinned with another digest: added README" in out
    assert load_config(config).models.trusted == {"marker": load_package(pinned).digest}
    assert radnode("verify")[0] == 0
    assert radnode("unpin", "marker")[0] == 0
    assert load_config(config).models.trusted == {}
    assert "trusted" in before
    assert "trusted" not in config.read_text()
    assert not (pinned.parent / ".trusted" / "marker.sha256").exists()
    code, _, err = radnode("unpin", "marker")
    assert code == 1
    assert "'marker' is not pinned" in err


def test_configuration_that_cannot_be_edited_gets_the_lines_told(
    radnode: Radnode, config: Path, models: Path, tmp_path: Path
) -> None:
    config.write_text("node: {storage: ./var}\nmodels:\n  path: >\n    models\n")
    before = config.read_text()
    config.write_text(before)
    source = write(tmp_path / "from" / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    code, out, err = radnode("add", source)
    assert (code, err) == (0, "")
    assert config.read_text() == before
    (folder,) = load_config(config).models.paths
    digest = load_package(folder / "marker").digest
    assert f"models:\n  trusted:\n    marker: {digest}\n" in out


def test_of_very_many_remarks_the_first_are_told(radnode: Radnode, pinned: Path) -> None:
    unknown = ", ".join(f"x{number}: 1" for number in range(30))
    (pinned / "dicom.yaml").write_text(f"{MANIFEST}overrides: {{{unknown}}}\n")
    assert radnode("pin", "marker")[0] == 0
    code, out, _ = radnode("verify")
    assert (code, out.count("so this changes nothing")) == (0, 19)
    assert "digest as pinned" in out
    assert out.endswith("  and 11 more: radnode models verify --json\n")
    (model,) = json.loads(radnode("verify", "--json")[1])["models"]
    assert len(model["remarks"]) == 31


def test_package_that_is_not_to_be_pinned(radnode: Radnode, config: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "from" / "marker", bundle_files() | {"dicom.yaml": MANIFEST.encode()})
    assert radnode("add", source, "--no-pin")[0] == 0
    assert load_config(config).models.trusted == {}
    assert radnode("pin", "marker")[0] == 0
    (source / "README").touch()
    code, out, _ = radnode("add", source, "--no-pin", "--replace")
    assert code == 0
    assert "pins another marker: this one is refused until that is changed" in out
    assert radnode("verify")[0] == 1


# -- Show --------------------------------------------------------------------------------------------------------------


def test_show_is_for_people_and_for_programs(radnode: Radnode, pinned: Path) -> None:
    code, out, _ = radnode("show", "marker")
    assert code == 0
    shown = " ".join(out.split())
    for words in ("title: Marker", "intended use: Tests only.", "licence of the weights: Apache-2.0", "pinned: yes",
                  "takes: Modality CT", "1 Marker Marker (99TEST 1)", "limits: slices_min 1"):  # fmt: skip
        assert words in shown
    told = json.loads(radnode("show", "marker", "--json")[1])
    assert told["digest"] == load_package(pinned).digest
    assert told["size"] == sum(path.stat().st_size for path in pinned.rglob("*") if path.is_file())
    assert told["inputs"]["image"]["takes"] == {"Modality": "CT"}
    assert told["meanings"]["1"]["type"] == "Marker (99TEST 1)"
    (pinned / "added").touch()
    assert "pinned: another digest" in " ".join(radnode("show", "marker")[1].split())
    code, _, err = radnode("show", "nothing")
    assert code == 1
    assert "no model package 'nothing'" in err
