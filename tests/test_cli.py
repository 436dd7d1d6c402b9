"""The command line: what it says, what it returns, and how soon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def radnode(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "node.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"node: {{port: 11999, storage: ./var}}\nmodels: {{path: {ROOT / 'models'}}}\n")
    return path


def test_help_names_every_command() -> None:
    done = radnode("--help")
    assert done.returncode == 0
    for command in (
        "demo",
        "check",
        "serve",
        "run",
        "import",
        "reprocess",
        "studies",
        "jobs",
        "deliveries",
        "models",
        "route",
        "peers",
    ):
        assert f"    {command} " in done.stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["jobs"], ["run"], ["jobs", "cancel", "x"]])
def test_wrong_use_is_2(arguments: list[str]) -> None:
    assert radnode(*arguments).returncode == 2


def test_listing_imports_nothing_heavy(config: Path) -> None:
    program = (
        "import sys; from node.cli import main; code = main(sys.argv[1:]); "
        "loaded = {'torch', 'monai', 'pynetdicom', 'highdicom', 'SimpleITK', 'pydicom', 'numpy'} & set(sys.modules); "
        "print(sorted(loaded), file=sys.stderr); sys.exit(code)"
    )
    for arguments in (["studies", "list"], ["jobs", "list"], ["deliveries", "list"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments, "--config", str(config)],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stderr.replace("'", '"')) == []


def test_errors_are_sentences(config: Path, tmp_path: Path) -> None:
    done = radnode("studies", "show", "1.2.3", "--config", str(config))
    assert done.returncode == 1
    assert done.stderr.startswith("radnode: no study 1.2.3")
    assert "Traceback" not in done.stderr
    config.write_text("node: {prot: 1}\n")
    done = radnode("jobs", "list", "--config", str(config))
    assert done.returncode == 1
    assert f"{config}:1: node.prot" in done.stderr
    done = radnode("jobs", "list", "--config", str(tmp_path / "missing.yaml"))
    assert done.returncode == 1
    assert "missing.yaml" in done.stderr


def test_check_says_everything_at_once(config: Path) -> None:
    text = config.read_text() + (
        "peers:\n  pacs: {ae_title: PACS, host: 127.0.0.1, port: 9}\n"
        "routes: [{name: r, when: {}, run: [missing], send_to: [pacs]}]\n"
    )
    config.write_text(text)
    done = radnode("check", "--json", "--config", str(config))
    assert done.returncode == 1
    findings = {(finding["what"], finding["verdict"]): finding["says"] for finding in json.loads(done.stdout)}
    assert "no DICOM answer" in findings["peer pacs", "wrong"]
    assert "runs missing" in findings["routes", "wrong"]
    assert ("storage", "good") in findings
    assert any(
        "ct_lung_reference" in says
        for (what, verdict), says in findings.items()
        if (what, verdict) == ("models", "good")
    )


def test_run_refuses_with_a_reason(tmp_path: Path, shared_data: Path) -> None:
    done = radnode(
        "run", str(shared_data / "brain_mr_t1"), "--model", "ct_lung_reference", "--out", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert "Modality" in done.stdout
    done = radnode("run", str(tmp_path / "nothing"), "--model", "ct_lung_reference", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    done = radnode("run", str(tmp_path), "--model", "unknown_model", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "ct_lung_reference" in done.stderr  # names what there is


def test_run_makes_seg_sr_and_picture(tmp_path: Path, shared_data: Path) -> None:
    out = tmp_path / "out"
    done = radnode(
        "run", str(shared_data / "chest_ct_siemens"), "--model", "ct_lung_reference", "--out", str(out), "--json"
    )
    assert done.returncode == 0, done.stderr
    (study,) = json.loads(done.stdout)
    assert {path.name for path in out.iterdir()} == {"seg.dcm", "sr.dcm", "preview.png"}
    volumes = {row["segment"]: row["value"] for row in study["measurements"] if row["measurement"] == "volume"}
    assert set(volumes) == {"Right lung", "Left lung"}
    assert all(700 < volume < 4500 for volume in volumes.values())


def test_route_explain_says_why(config: Path, shared_data: Path) -> None:
    config.write_text(
        config.read_text()
        + "routes: [{name: chest, when: {Modality: CT, SliceThickness: '<= 6'}, run: [ct_lung_reference]}]\n"
    )
    done = radnode("route", "explain", str(shared_data / "chest_ct_siemens"), "--config", str(config), "--json")
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert [series["matches"] for series in document["series"]] == [False, False]
    says = [condition["says"] for condition in document["series"][0]["conditions"] if not condition["holds"]]
    assert len(says) == 1
    assert "SliceThickness" in says[0]
    assert "8" in says[0]


def test_check_looks_at_every_door(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short\n")
    (tmp_path / "config.yaml").write_text(
        """\
node: {storage: ./var}
models: {path: [models]}
receive: {tls: {certificate: node.pem, key: node.key, client_authority: ca.pem}}
web: {listen: "127.0.0.1:18080", token_file: token}
"""
    )
    done = radnode("check", "--json", "--config", str(tmp_path / "config.yaml"))
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert (findings["TLS"]["verdict"], findings["web token"]["verdict"]) == ("wrong", "wrong")
    assert "node.pem" in findings["TLS"]["says"]
    assert "16 characters" in findings["web token"]["says"]
    assert {"port", "TLS port", "web port"} <= set(findings)
