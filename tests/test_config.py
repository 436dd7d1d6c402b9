"""The configuration: what it says, and that every mistake is told with its line, field and what was expected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from pydantic import ValidationError

from node.config import Config, find_config, load_config
from node.config_values import FreeSpace
from node.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]

GOOD = """\
node:
  ae_title: RADNODE
  port: 11112
  storage: ./var
database: sqlite
peers:
  pacs: {ae_title: ORTHANC, host: 127.0.0.1, port: 4242}
  ct1:
    ae_title: CT1
    host: 10.1.2.3
receive:
  from: [ct1, pacs]
complete:
  quiet: 30s
models:
  path: models
routes:
  - name: chest CT
    when:
      Modality: CT
      BodyPartExamined: [CHEST, THORAX, LUNG, null]
      SliceThickness: "<= 8"
    run: [ct_lung_reference]
    send_to: [pacs]
workers: {engine: local, count: 1}
keep:
  studies: 7d
  free_disk: 10%
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a configuration and gives its path."""

    def write_config(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write_config


def changed(before: str, after: str) -> str:
    assert GOOD.count(before) == 1, f"{before!r} stands {GOOD.count(before)} times in the good configuration"
    return GOOD.replace(before, after)


def test_example_configuration_loads() -> None:
    config = load_config(REPOSITORY / "config.yaml")
    assert config.path == REPOSITORY / "config.yaml"
    assert config.node.storage == REPOSITORY / "var"
    assert config.models.paths == (REPOSITORY / "models",)
    assert config.routes[0].when["BodyPartExamined"] == ("CHEST", "THORAX", "LUNG", None)
    assert config.receive.from_ == ("pacs", "sender")
    assert config.peers["sender"].port is None


def test_values_are_typed_and_carry_their_units(write: Write) -> None:
    path = write(GOOD)
    config = load_config(path)
    assert config.complete.quiet_s == 30.0
    assert config.keep.studies_s == 7 * 24 * 3600
    assert config.keep.free_disk == FreeSpace(percent=10.0)
    assert config.keep.free_disk.wanted_bytes(1005) == 101
    assert config.workers.device == "auto"
    assert config.receive.maximum_associations == 64
    assert config.receive.called_ae_check is True
    with pytest.raises(ValidationError, match="frozen"):
        config.node.port = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_smallest_configuration(write: Write) -> None:
    config = load_config(write("node: {storage: /srv/radnode}\nmodels: {path: [a, /b]}\n"))
    assert (config.node.ae_title, config.node.host, config.node.port) == ("RADNODE", "0.0.0.0", 11112)
    assert config.node.storage == Path("/srv/radnode")
    assert config.models.paths == (config.path.parent / "a", Path("/b"))
    assert config.receive.from_ == ()
    assert config.complete.quiet_s == 30.0
    assert config.keep.studies_s == 604800.0


def test_a_receivers_limits(write: Write) -> None:
    config = load_config(
        write(
            """\
node: {storage: /srv/radnode}
models: {path: a}
peers:
  ct:
    ae_title: CT
    host: 10.1.2.9/24
    maximum_associations: 4
    maximum_rate: 2.5
    sop_classes: [1.2.840.10008.5.1.4.1.1.2]
receive:
  from: [ct]
  maximum_per_address: 9
  unknown_sop_classes: true
  maximum_object: 500MB
  idle: 10m
  durability: relaxed
  tls: {certificate: node.pem, key: node.key, client_authority: /etc/ssl/hospital.pem}
  watch: incoming
"""
        )
    )
    peer, receive, folder = config.peers["ct"], config.receive, config.path.parent
    assert (peer.host, peer.maximum_associations, peer.maximum_rate) == ("10.1.2.0/24", 4, 2.5)
    assert peer.sop_classes == ("1.2.840.10008.5.1.4.1.1.2",)
    assert (receive.maximum_per_address, receive.maximum_object_bytes, receive.idle_s) == (9, 500_000_000, 600.0)
    assert (receive.unknown_sop_classes, receive.durability, receive.watch) == (True, "relaxed", folder / "incoming")
    assert receive.tls is not None
    assert (receive.tls.port, receive.tls.certificate) == (2762, folder / "node.pem")
    assert receive.tls.client_authority == Path("/etc/ssl/hospital.pem")


def test_relaxed_durability_is_for_one_machine(write: Write) -> None:
    several = GOOD.replace("database: sqlite", "database: postgresql+psycopg://radnode:secret@db/radnode")
    with pytest.raises(ConfigError) as caught:
        load_config(write(several.replace("receive:", "receive:\n  durability: relaxed")))
    (problem,) = caught.value.problems
    assert problem.field == "receive.durability"
    assert "relaxed is for one machine with SQLite" in problem.message


def test_a_receivers_mistakes(write: Write) -> None:
    wrong = """\
node: {storage: /srv/radnode}
models: {path: a}
peers:
  net: {ae_title: CT, host: 10.1.2.0/24, port: 104}
  odd: {ae_title: MR, host: 10.1.2.0/99, maximum_rate: 0, sop_classes: [CT]}
receive: {maximum_object: huge, durability: fast, tls: {port: 2762}}
"""
    with pytest.raises(ConfigError) as caught:
        load_config(write(wrong))
    told = {problem.field: problem for problem in caught.value.problems}
    assert "expected one host" in str(told["peers.net.host"])
    assert "10.1.2.0/24" in str(told["peers.odd.host"])
    for field in ("peers.odd.maximum_rate", "peers.odd.sop_classes[0]", "receive.maximum_object", "receive.durability",
                  "receive.tls.certificate", "receive.tls.key", "receive.tls.client_authority"):  # fmt: skip
        assert field in told, sorted(told)


@pytest.mark.parametrize(
    ("written", "seconds"), [("30s", 30), ("1.5m", 90), ("10 m", 600), ("2h", 7200), ("7d", 604800), ("'1s'", 1)]
)
def test_durations(write: Write, written: str, seconds: float) -> None:
    config = load_config(write(changed("quiet: 30s", f"quiet: {written}")))
    assert config.complete.quiet_s == seconds


@pytest.mark.parametrize(
    ("written", "wanted_bytes"),
    [("10%", 100_000_000), ("0%", 0), ("20GB", 20_000_000_000), ("1.5MiB", 1_572_864), ("2 TB", 2_000_000_000_000)],
)
def test_free_disk(write: Write, written: str, wanted_bytes: int) -> None:
    config = load_config(write(changed("free_disk: 10%", f"free_disk: {written}")))
    assert config.keep.free_disk.wanted_bytes(1_000_000_000) == wanted_bytes


def test_numbers_as_ae_title_and_peer_name(write: Write) -> None:
    config = load_config(
        write("node: {storage: a, ae_title: 0123}\nmodels: {path: m}\npeers: {7: {ae_title: 12, host: a}}\n")
    )
    assert config.node.ae_title == "0123"
    assert config.peers["7"].ae_title == "12"


def test_database_url_opens_the_archive_in_the_storage(write: Write, tmp_path: Path) -> None:
    config = load_config(write(changed("storage: ./var", "storage: ./a folder")))
    (tmp_path / "a folder").mkdir()
    assert sqlalchemy.make_url(config.database_url).database == str(tmp_path / "a folder" / "radnode.sqlite")
    sqlalchemy.create_engine(config.database_url).connect().close()
    assert (tmp_path / "a folder" / "radnode.sqlite").is_file()
    url = "postgresql+psycopg://radnode:secret@db:5432/radnode"
    config = load_config(write(changed("database: sqlite", f"database: {url}")))
    assert config.database_url == url
    assert "secret" not in repr(config)


DIGEST = "ab" * 32

MISTAKES = [
    ("port: 11112", "port: 70000", 3, "node.port", "found the number 70000; expected a number of at most 65535"),
    ("port: 11112", "port: eleven", 3, "node.port", "found 'eleven'; expected a whole number"),
    ("port: 11112", "host: http://x/", 3, "node.host",
     "found 'http://x/'; expected a host name or an IP address, without a port"),
    ("  ae_title: RADNODE\n", "  ae_title: RADIOLOGY_INFERENCE\n", 2, "node.ae_title",
     "found 'RADIOLOGY_INFERENCE'; expected an AE title: 1 to 16 ASCII characters, no backslash, not only spaces"),
    ("  ae_title: RADNODE\n", "  ae_title: 'A\\B'\n", 2, "node.ae_title",
     "found 'A\\\\B'; expected an AE title: 1 to 16 ASCII characters, no backslash, not only spaces"),
    ("  ae_title: RADNODE\n", "  ae_title: '  '\n", 2, "node.ae_title",
     "found '  '; expected an AE title: 1 to 16 ASCII characters, no backslash, not only spaces"),
    ("  storage: ./var\n", "", 1, "node.storage", "is missing; expected a value"),
    ("database: sqlite", "database: mysql://root:secret@db/x", 5, "database",
     "found another database than radnode knows; expected sqlite, or postgresql+psycopg://user:password@host/name"),
    ("    ae_title: CT1\n", "    aetitle: CT1\n    ae_title: CT1\n", 9, "peers.ct1.aetitle",
     "is not a known field; did you mean ae_title?"),
    ("    host: 10.1.2.3\n", "", 8, "peers.ct1.host", "is missing; expected a value"),
    ("    ae_title: CT1\n    host: 10.1.2.3\n", "    ae_title: ORTHANC\n    host: 127.0.0.1\n", 8, "peers.ct1",
     "has the same ae_title and host as pacs; expected one peer of the two"),
    ("from: [ct1, pacs]", "from: [ct1, ct2]", 12, "receive.from[1]",
     "found 'ct2', which is not the name of a peer; expected one of pacs, ct1"),
    ("from: [ct1, pacs]", "called_ae_check: 1", 12, "receive.called_ae_check",
     "found the number 1; expected true or false"),
    ("from: [ct1, pacs]", "maximum_associations: 0", 12, "receive.maximum_associations",
     "found the number 0; expected a number of at least 1"),
    ("quiet: 30s", "quiet: 30", 14, "complete.quiet",
     "found 30; expected a duration above zero with its unit, such as 30s, 10m, 2h or 7d"),
    ("quiet: 30s", "quiet: 0s", 14, "complete.quiet",
     "found '0s'; expected a duration above zero with its unit, such as 30s, 10m, 2h or 7d"),
    ("path: models", "paths: models\n  path: models", 16, "models.paths", "is not a known field; did you mean path?"),
    ("path: models", "path: []", 16, "models.path", "found an empty list; expected at least 1 of them"),
    ("path: models", "path: models\n  trusted:\n    a: abc", 18, "models.trusted.a",
     "found 'abc'; expected a package's digest: the 64 hexadecimal digits of a SHA-256"),
    ("      Modality: CT\n", "      Modallity: CT\n", 20, "routes[0].when.Modallity",
     "is not a DICOM keyword; did you mean Modality?"),
    ('SliceThickness: "<= 8"', "SliceThickness: thin", 22, "routes[0].when.SliceThickness",
     "found 'thin'; expected a number, a comparison such as '<= 8', a /regex/ or null"),
    ("run: [ct_lung_reference]", "run: ct_lung_reference", 23, "routes[0].run",
     "found 'ct_lung_reference'; expected a list, such as [a, b]"),
    ("run: [ct_lung_reference]", "run: [../secret]", 23, "routes[0].run[0]",
     "found '../secret'; expected a name: 1 to 64 letters, digits, '_', '-' or '.', a letter or digit first"),
    ("send_to: [pacs]", "send_to: [pcas]", 24, "routes[0].send_to[0]",
     "found 'pcas', which is not the name of a peer; expected one of pacs, ct1"),
    ("send_to: [pacs]", "send_to: [ct1]", 24, "routes[0].send_to[0]",
     "found 'ct1', a peer without a port; expected peers.ct1.port, to send there"),
    ("send_to: [pacs]", "quiet: 2m", 24, "routes[0].quiet",
     "found '2m', longer than complete.quiet (30s), after which a study is complete for every route; expected less, or "
     "a longer complete.quiet"),
    ("send_to: [pacs]", "priority: asap", 24, "routes[0].priority",
     "found 'asap'; expected 'stat', 'urgent', 'routine' or 'background'"),
    ("send_to: [pacs]", "priority_when: [{when: {Modallity: CT}, priority: stat}]", 24,
     "routes[0].priority_when[0].when.Modallity", "is not a DICOM keyword; did you mean Modality?"),
    ("    send_to: [pacs]\n", "  - {name: chest CT, when: {}, run: [a]}\n", 24, "routes[1].name",
     "found 'chest CT' as routes[0] has it; expected another name"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, address: head}", 25, "workers.address",
     "found 'head'; expected auto, or the address of Ray's head, such as 10.1.2.3:6379"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, address: 'ray://head:10001'}", 25, "workers.address",
     "found 'ray://head:10001'; expected auto, or the address of Ray's head, such as 10.1.2.3:6379"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, gpus: 2}", 25, "workers.gpus",
     "found 2; expected the share of a GPU that one slot has: 0 (none) to 1, such as 0.5"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, device: cpu, gpus: 0.5}", 25, "workers.gpus",
     "found 0.5 with workers.device cpu; expected 0, or another device"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, device: cuda, gpus: 0}", 25, "workers.gpus",
     "found 0 with workers.device cuda; expected a share of a GPU, such as 0.5"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, device: 'cuda:1'}", 25, "workers.device",
     "found 'cuda:1'; Ray chooses the GPU of a slot, expected auto, cpu or cuda"),
    ("workers: {engine: local, count: 1}", "workers: {engine: ray, package_cache: packages}", 25,
     "workers.package_cache", "found 'packages'; expected a path that begins with /, the same on every machine"),
    ("workers: {engine: local, count: 1}", "workers: {gpus: 0.5}", 25, "workers.gpus",
     "is for slots in a Ray cluster; expected workers.engine: ray with it"),
    ("workers: {engine: local, count: 1}", "workers: {engine: slurm}", 25, "workers.engine",
     "found 'slurm'; expected 'local' or 'ray'"),
    ("workers: {engine: local, count: 1}", "workers: {count: 1.5}", 25, "workers.count",
     "found the number 1.5; expected a whole number"),
    ("workers: {engine: local, count: 1}", "workers: {device: gpu0}", 25, "workers.device",
     "found 'gpu0'; expected auto, cpu, cuda, or cuda:N for one GPU of several"),
    ("free_disk: 10%", "free_disk: 100%", 28, "keep.free_disk",
     "found '100%'; expected a share of the disk below 100%, such as 10%, or a size, such as 20GB"),
    ("  free_disk: 10%\n", "  free_disk: 10%\nweb: {listen: '8080'}\n", 29, "web.listen",
     "found '8080'; expected an address and a port, such as 127.0.0.1:8080"),
    ("  free_disk: 10%\n", "  free_disk: 10%\nwebb: {}\n", 29, "webb",
     "is not a known field; did you mean web?"),
    ("routes:\n", "routes:\nroutes:\n", 18, "routes", "stands here a second time (first in line 17); expected it once"),
    ('"<= 8"', ">= 3", 22, "", 'found text that begins with > or |; such text needs quotes, as in "> 5"'),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "line", "field", "message"),
    MISTAKES,
    ids=[f"{mistake[3]}-{number}" for number, mistake in enumerate(MISTAKES)],
)
def test_mistake_is_told_with_line_and_field(
    *, write: Write, before: str, after: str, line: int, field: str, message: str
) -> None:
    path = write(changed(before, after))
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    (problem,) = refusal.value.problems
    assert (problem.file, problem.line, problem.field, problem.message) == (path, line, field, message)
    assert str(refusal.value) == f"{path}:{line}: {f'{field}: ' if field else ''}{message}"


KINDS = "expected 'seg', 'sr', 'summary', 'overlay', 'map', 'keys', 'gsps' or 'rtstruct'"
PRIORITIES = "expected 'stat', 'urgent', 'routine' or 'background'"
DURATION = "expected a duration above zero with its unit, such as 30s, 10m, 2h or 7d"
TRUTH = "expected true or false"
BANNER = "expected one line of 4 to 80 printable characters, for every picture"
DESCRIPTION = "expected text in which {model}, {version}, {title} and {kind} may stand"

# Of what results and queues are told: the section, what stands there, the field in it, and what is said of it.
FURTHER = [
    ("peer", "results: [segs]", "results[0]", f"found 'segs'; {KINDS}"),
    ("peer", "results: [null]", "results[0]", f"found nothing; {KINDS}"),
    ("peer", "results: []", "results", "found an empty list; expected at least 1 of them"),
    ("peer", "results: seg", "results", "found 'seg'; expected a list, such as [a, b]"),
    ("peer", "results: {seg: true}", "results", "found a mapping of fields; expected a list, such as [a, b]"),
    ("peer", "seg: label", "seg", "found 'label'; expected 'auto', 'binary', 'labelmap' or 'fractional'"),
    ("peer", "seg: [binary]", "seg", "found a list of 1; expected 'auto', 'binary', 'labelmap' or 'fractional'"),
    ("peer", "compression: jpeg", "compression", "found 'jpeg'; expected 'none' or 'lossless'"),
    ("peer", "compression: true", "compression", "found true; expected 'none' or 'lossless'"),
    ("peer", "query: 1", "query", f"found the number 1; {TRUTH}"),
    ("peer", "query: yes", "query", f"found 'yes'; {TRUTH}"),
    ("peer", "commitment: often", "commitment", f"found 'often'; {TRUTH}"),
    ("sender", "query: true", "query", "found true for a peer without a port; expected peers.ct1.port, to ask"),
    ("sender", "commitment: true", "commitment",
     "found true for a peer without a port; expected peers.ct1.port, to ask"),
    ("route", "results: [seg, 3]", "results[1]", f"found the number 3; {KINDS}"),
    ("route", "results:", "results", "found nothing; expected a list, such as [a, b]"),
    ("route", "tell_no_result: maybe", "tell_no_result", f"found 'maybe'; {TRUTH}"),
    ("route", "tell_no_result: 0", "tell_no_result", f"found the number 0; {TRUTH}"),
    ("route", "priority: 1", "priority", f"found the number 1; {PRIORITIES}"),
    ("route", "priority:", "priority", f"found nothing; {PRIORITIES}"),
    ("route", "priority_when: {when: {}, priority: stat}", "priority_when",
     "found a mapping of fields; expected a list, such as [a, b]"),
    ("route", "priority_when: [stat]", "priority_when[0]", "found 'stat'; expected a mapping of fields"),
    ("route", "priority_when: [{when: {}}]", "priority_when[0].priority", "is missing; expected a value"),
    ("route", "priority_when: [{priority: stat}]", "priority_when[0].when", "is missing; expected a value"),
    ("route", "priority_when: [{when: {}, priority: soon}]", "priority_when[0].priority",
     f"found 'soon'; {PRIORITIES}"),
    ("route", "priority_when: [{when: {}, priority: stat, quiet: 1s}]", "priority_when[0].quiet",
     "is not a known field; expected one of when, priority"),
    ("route", "deadline: 30", "deadline", f"found 30; {DURATION}"),
    ("route", "deadline: -5m", "deadline", f"found '-5m'; {DURATION}"),
    ("route", "deadline: [1h]", "deadline", f"found ['1h']; {DURATION}"),
    ("route", "quiet: 0s", "quiet", f"found '0s'; {DURATION}"),
    ("route", "quiet: 2 weeks", "quiet", f"found '2 weeks'; {DURATION}"),
    ("route", "start: early", "start", "found 'early'; expected 'study' or 'series'"),
    ("route", "start: true", "start", "found true; expected 'study' or 'series'"),
    ("complete", "longest: 5", "longest", f"found 5; {DURATION}"),
    ("complete", "longest:", "longest", f"found nothing; {DURATION}"),
    ("complete", "longest: 10s", "longest", "found '10s', shorter than complete.quiet (30s); expected as much or more: "
     "so long a study is waited for whose sender has more of it"),
    ("results", "series_number: 0", "series_number", "found the number 0; expected a number of at least 1"),
    ("results", "series_number: 1000000", "series_number",
     "found the number 1000000; expected a number of at most 999000"),
    ("results", "series_number: nine", "series_number", "found 'nine'; expected a whole number"),
    ("results", "series_numbers: [901]", "series_numbers", "found a list of 1; expected a mapping of names to values"),
    ("results", "series_numbers: {lungs: many}", "series_numbers.lungs", "found 'many'; expected a whole number"),
    ("results", "series_numbers: {a b: 901}", "series_numbers.a b",
     "found 'a b'; expected a name: 1 to 64 letters, digits, '_', '-' or '.', a letter or digit first"),
    ("results", "series_description: '{mode}'", "series_description", f"found '{{mode}}'; {DESCRIPTION}"),
    ("results", "series_description: '{model'", "series_description", f"found '{{model'; {DESCRIPTION}"),
    ("results", "series_description: ''", "series_description",
     "found ''; expected text of printable characters without a backslash"),
    ("results", "banner: AI", "banner", f"found 'AI'; {BANNER}"),
    ("results", "banner: '     '", "banner", f"found '     '; {BANNER}"),
    ("results", 'banner: "not\\nverified"', "banner", f"found 'not\\nverified'; {BANNER}"),
    ("results", f"banner: {'x' * 81}", "banner", f"found '{'x' * 80}'; {BANNER}"),
    ("results", "language: english", "language", "found 'english'; expected 'en', 'de', 'es', 'fr', 'it' or 'nl'"),
    ("results", "withdraw_replaced: 1", "withdraw_replaced", f"found the number 1; {TRUTH}"),
    ("results", "baner: unverified", "baner", "is not a known field; did you mean banner?"),
]  # fmt: skip
PLACES = {
    "peer": ("port: 4242}", "port: 4242, {}}", "peers.pacs."),
    "sender": ("    host: 10.1.2.3\n", "    host: 10.1.2.3\n    {}\n", "peers.ct1."),
    "route": ("    send_to: [pacs]\n", "    send_to: [pacs]\n    {}\n", "routes[0]."),
    "complete": ("  quiet: 30s\n", "  quiet: 30s\n  {}\n", "complete."),
    "results": ("keep:\n", "results:\n  {}\nkeep:\n", "results."),
}


@pytest.mark.parametrize(("place", "written", "field", "message"), FURTHER, ids=[f"{p}-{w}" for p, w, _, _ in FURTHER])
def test_mistakes_about_results_and_queues(*, write: Write, place: str, written: str, field: str, message: str) -> None:
    before, after, section = PLACES[place]
    text = changed(before, after.replace("{}", written))
    line = next(number for number, found in enumerate(text.splitlines(), 1) if written in found)
    with pytest.raises(ConfigError) as refusal:
        load_config(write(text))
    (problem,) = refusal.value.problems
    assert (problem.line, problem.field, problem.message) == (line, section + field, message)


def test_a_section_of_results_that_is_none(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml:29: results: found 'text'; expected a mapping of fields"):
        load_config(write(GOOD + "results: text\n"))


def test_a_quiet_period_longer_than_the_usual_longest_stands(write: Write) -> None:
    assert load_config(write(changed("quiet: 30s", "quiet: 15m"))).complete.quiet_s == 900


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = changed("port: 11112", "port: 0").replace("from: [ct1", "from: [nobody").replace("Modality:", "Modalty:")
    text = text.replace("send_to: [pacs]", "send_to: [ct1]").replace("7d", "7 days").replace("count: 1", "cont: 1")
    with pytest.raises(ConfigError) as refusal:
        load_config(write(text))
    assert [(problem.line, problem.field) for problem in refusal.value.problems] == [
        (3, "node.port"),
        (12, "receive.from[0]"),
        (20, "routes[0].when.Modalty"),
        (24, "routes[0].send_to[0]"),
        (25, "workers.cont"),
        (27, "keep.studies"),
    ]


def test_memory_of_models(write: Write) -> None:
    assert load_config(write(changed("{engine: local, count: 1}", "{memory: 24GiB}"))).workers.memory_bytes == 24 << 30
    assert load_config(write(changed("{engine: local, count: 1}", "{count: 2}"))).workers.memory_bytes is None
    slots = load_config(write(changed("{engine: local, count: 1}", "{engine: ray, count: 8, gpus: 0.5}"))).workers
    assert (slots.address, slots.slot_gpus, slots.cpus, slots.package_cache) == ("auto", 0.5, 1.0, None)
    for device, gpus in {"auto": 1.0, "cuda": 1.0, "cpu": 0.0}.items():
        asked = changed("{engine: local, count: 1}", f"{{engine: ray, device: {device}}}")
        assert load_config(write(asked)).workers.slot_gpus == gpus
    with pytest.raises(ConfigError, match=r"workers\.memory: found 24; expected a size above zero"):
        load_config(write(changed("{engine: local, count: 1}", "{memory: 24}")))


@pytest.mark.parametrize("section", ["node", "peers", "receive", "models", "routes", "workers", "keep"])
@pytest.mark.parametrize("content", ["", " 5", " [1]", " {a: {b: c}}", " [{send_to: 3}]", " text"])
def test_section_of_any_shape_is_refused_where_it_stands(write: Write, section: str, content: str) -> None:
    base = {"node": "{storage: a}", "models": "{path: m}"} | {section: content.strip()}
    with pytest.raises(ConfigError) as refusal:
        load_config(write("".join(f"{name}: {value}\n" for name, value in base.items())))
    assert {problem.field.split(".")[0].split("[")[0] for problem in refusal.value.problems} == {section}


def test_peers_of_a_wrong_shape_are_told_once(write: Write) -> None:
    head, rest = GOOD.split("peers:\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(write(f"{head}peers: pacs\nreceive:{rest.split('receive:')[1]}"))
    assert [problem.field for problem in refusal.value.problems] == ["peers"]


def test_password_is_never_told(write: Write) -> None:
    for wrong in (
        "postgresql://u:secret@db/x",
        "postgresql+psycopg://u:secret@db:notaport/x",
        "[secret]",
        "{a: secret}",
    ):
        with pytest.raises(ConfigError) as refusal:
            load_config(write(changed("database: sqlite", f"database: {wrong}")))
        assert refusal.value.problems[0].field == "database"
        assert "secret" not in str(refusal.value)


def test_find_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RADNODE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("node.config.SYSTEM_CONFIG", tmp_path / "etc" / "config.yaml")
    with pytest.raises(ConfigError) as refusal:
        find_config()
    for place in ("$RADNODE_CONFIG (not set)", str(tmp_path / "config.yaml"), str(tmp_path / "etc" / "config.yaml")):
        assert place in str(refusal.value)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "config.yaml").write_text(GOOD)
    assert find_config() == tmp_path / "etc" / "config.yaml"
    (tmp_path / "config.yaml").write_text(GOOD)
    assert find_config() == Path("config.yaml")
    (tmp_path / "mine.yaml").write_text(GOOD)
    monkeypatch.setenv("RADNODE_CONFIG", str(tmp_path / "mine.yaml"))
    assert find_config() == tmp_path / "mine.yaml"
    assert find_config(Path("config.yaml")) == Path("config.yaml")
    with pytest.raises(ConfigError, match=r"other\.yaml: there is no such configuration file"):
        find_config(Path("other.yaml"))
    monkeypatch.setenv("RADNODE_CONFIG", str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match=r"gone\.yaml: .* \(as \$RADNODE_CONFIG names it\)"):
        find_config()


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from node.config import load_config; "
        f"load_config(Path({str(REPOSITORY / 'config.yaml')!r})); "
        "print([name for name in ('torch', 'monai', 'sqlalchemy', 'pynetdicom', 'highdicom') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ran.stdout.strip() == "[]"


def test_config_type_is_what_load_config_gives(write: Write) -> None:
    assert isinstance(load_config(write(GOOD)), Config)


def test_the_http_door_needs_a_token_beyond_this_machine(write: Write) -> None:
    start = "node: {storage: /srv/radnode}\nmodels: {path: a}\n"
    assert load_config(write(start)).web is None
    web = load_config(write(f'{start}web: {{listen: "[::1]:8081"}}\n')).web
    assert web is not None
    assert web.listen == ("::1", 8081)
    assert load_config(write(f'{start}web: {{listen: "0.0.0.0:80", token_file: token}}\n')).web is not None
    for wrong, told in (("0.0.0.0:80", "expected token_file too"), ("8080", "expected an address and a port")):
        with pytest.raises(ConfigError, match=told):
            load_config(write(f'{start}web: {{listen: "{wrong}"}}\n'))
