"""Files over HTTP from a server on this machine that does what networks and servers do."""

from __future__ import annotations

import fcntl
import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from node.errors import FetchError
from node.infer.fetch import Checksum, Limits, download, fetch_text, shown
from tests.infer.site import Site, running_site

BODY = random.Random(1).randbytes(3_000_000)
LIMITS = Limits(size_max=10_000_000, silence_s=5, attempts=3, wait_s=0)


def sha(body: bytes, algorithm: str = "sha256") -> Checksum:
    return Checksum(algorithm, hashlib.new(algorithm, body).hexdigest())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "kept" / "bundle.zip"


def fetch(url: str, target: Path, checksum: Checksum | None = None, limits: Limits = LIMITS) -> list[float]:
    """Download without waiting; the waits that were asked for."""
    waits: list[float] = []
    download(url, target, checksum=checksum, limits=limits, sleep=waits.append)
    return waits


def left_behind(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_whole_file_with_its_checksum(site: Site, target: Path, *, algorithm: str, length: bool) -> None:
    told: list[tuple[int, int | None]] = []
    url = site.put("/bundle.zip", BODY, length=length)
    download(url, target, checksum=sha(BODY, algorithm), limits=LIMITS, progress=lambda *at: told.append(at))
    assert target.read_bytes() == BODY
    assert left_behind(target) == ["bundle.zip"]
    assert told[0] == (0, len(BODY) if length else None)
    assert told[-1] == (len(BODY), len(BODY) if length else None)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_cut_in_the_middle_goes_on_from_there(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[1_000_000, 500_000])
    fetch(url, target, sha(BODY))
    assert target.read_bytes() == BODY
    assert site.ranges_asked("/bundle.zip") == [None, "bytes=1000000-", "bytes=1500000-"]
    assert site.asked[-1].if_range == site.pages["/bundle.zip"].etag


def test_what_came_waits_for_the_next_call(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[1000, 10, 10])
    with pytest.raises(FetchError, match=r"ended after 1,020 of 3,000,000 bytes, 3 times .* 1,020 bytes .* are kept"):
        fetch(url, target)
    assert left_behind(target) == ["bundle.zip.part", "bundle.zip.part.json"]
    fetch(url, target)
    assert target.read_bytes() == BODY
    assert site.ranges_asked("/bundle.zip")[-1] == "bytes=1020-"
    assert left_behind(target) == ["bundle.zip"]


def test_waits_grow_and_start_again_after_progress(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[10, 10, 1_500_000, 10])
    assert fetch(url, target, limits=replace(LIMITS, wait_s=1)) == [1, 2, 1, 1]
    assert target.read_bytes() == BODY


def test_part_that_is_whole_already(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY)
    fetch(site.put("/bundle.zip", BODY, cuts=[10]), target)
    part = target.rename(target.with_name("bundle.zip.part"))
    etag = site.pages["/bundle.zip"].etag.replace('"', '\\"')  # pyright: ignore[reportOptionalMemberAccess]
    note = f'{{"url": "{url}", "validator": "{etag}", "total": {len(BODY)}}}'
    part.with_name("bundle.zip.part.json").write_text(note)
    site.asked.clear()
    fetch(url, target, sha(BODY))
    assert target.read_bytes() == BODY
    assert site.ranges_asked("/bundle.zip") == [f"bytes={len(BODY)}-"]


OTHER = [
    ("another file", {}),
    ("another file, ranges not understood", {"ranges": False}),
    ("another, shorter file", {"cut": 500}),
]


@pytest.mark.parametrize(("what", "how"), OTHER, ids=[case[0] for case in OTHER])
def test_part_of_a_file_that_changed_meanwhile_is_not_used(site: Site, target: Path, what: str, how: dict) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[1000, 10, 10])
    with pytest.raises(FetchError):
        fetch(url, target)
    changed = BODY[::-1][: how.pop("cut", None)]
    site.put("/bundle.zip", changed, **how)
    fetch(url, target)
    assert target.read_bytes() == changed, what


def test_without_a_validator_only_a_checksum_lets_it_go_on(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[1000, 1000], etag=None)
    fetch(url, target)
    assert site.ranges_asked("/bundle.zip") == [None, None, None]
    target.unlink()
    site.asked.clear()
    site.put("/bundle.zip", BODY, cuts=[1000], etag='W/"1"')  # a weak one does not promise equal bytes
    fetch(url, target)
    assert site.ranges_asked("/bundle.zip") == [None, None]
    target.unlink()
    site.asked.clear()
    site.put("/bundle.zip", BODY, cuts=[1000], etag=None)
    fetch(url, target, sha(BODY))
    assert site.ranges_asked("/bundle.zip") == [None, "bytes=1000-"]
    target.unlink()
    site.asked.clear()
    site.put("/bundle.zip", BODY, cuts=[1000], etag=None, modified="Sat, 21 Nov 2026 12:00:00 GMT")
    fetch(url, target)
    assert site.asked[-1].if_range == "Sat, 21 Nov 2026 12:00:00 GMT"
    assert target.read_bytes() == BODY


def test_another_part_than_was_asked_for_is_not_appended(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY, cuts=[1000], shifted=True)
    fetch(url, target)
    assert target.read_bytes() == BODY
    assert site.ranges_asked("/bundle.zip") == [None, "bytes=1000-", None]


def test_wrong_checksum_leaves_nothing(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", BODY)
    with pytest.raises(FetchError, match=f"its sha256 is {sha(BODY).digest}, expected {sha(b'other').digest}"):
        fetch(url, target, sha(b"other"))
    assert left_behind(target) == []


def test_too_large_leaves_nothing(site: Site, target: Path) -> None:
    small = replace(LIMITS, size_max=1_000_000)
    with pytest.raises(FetchError, match="has 3,000,000 bytes; more than 1,000,000 are not taken"):
        fetch(site.put("/bundle.zip", BODY), target, limits=small)
    with pytest.raises(FetchError, match="goes on past 1,000,000 bytes"):
        fetch(site.put("/bundle.zip", BODY, length=False), target, limits=small)
    assert left_behind(target) == []


def test_endless_body_ends_at_the_limit(site: Site, target: Path) -> None:
    with pytest.raises(FetchError, match="goes on past 10,000,000 bytes"):
        fetch(site.put("/bundle.zip", BODY, endless=True), target)
    assert left_behind(target) == []


def test_more_than_the_disk_holds_is_not_begun(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.infer.fetch.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(FetchError, match=r"needs 3,000,000 bytes, and .* has 1,000,000 free"):
        fetch(site.put("/bundle.zip", BODY), target)


def test_silent_server_is_given_up(site: Site, target: Path) -> None:
    limits = replace(LIMITS, silence_s=0.2)
    with pytest.raises(FetchError, match="the server is silent, 3 times in a row"):
        fetch(site.put("/bundle.zip", BODY, silent_after=1000), target, limits=limits)
    assert site.ranges_asked("/bundle.zip") == [None, "bytes=1000-", "bytes=2000-"]


def test_trickle_is_given_up(site: Site, target: Path) -> None:
    """A server that sends a byte now and then is never silent, and would be never done."""
    limits = replace(LIMITS, rate_window_s=0.3, attempts=2)
    with pytest.raises(FetchError, match="sends less than 1,000 bytes per second, 2 times in a row"):
        fetch(site.put("/bundle.zip", BODY, trickle_s=0.02), target, limits=limits)


def test_nobody_there(target: Path) -> None:
    with running_site() as closed:
        url = closed.url + "/bundle.zip"
    with pytest.raises(FetchError, match=r"no connection \(Connection refused\), 3 times in a row$"):
        fetch(url, target)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_server_in_trouble_is_asked_again(site: Site, target: Path, status: int) -> None:
    fetch(site.put("/bundle.zip", BODY, statuses=[status, status]), target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusal_is_told_at_once(site: Site, target: Path, status: int) -> None:
    with pytest.raises(FetchError, match=f"the server answers {status} "):
        fetch(site.put("/bundle.zip", BODY, statuses=[status]), target)
    assert len(site.asked) == 1


def test_redirects_to_http_are_followed(site: Site, target: Path) -> None:
    site.put("/new/bundle.zip", BODY)
    site.put("/moved", location="/new/bundle.zip")
    fetch(site.put("/bundle.zip", location=f"{site.url}/moved"), target)
    assert target.read_bytes() == BODY


ELSEWHERE = ["file:///etc/passwd", "ftp://127.0.0.1/bundle.zip", "data:text/plain,bundle", "gopher://127.0.0.1/"]


@pytest.mark.parametrize("place", ELSEWHERE)
def test_nothing_but_http_is_spoken(site: Site, target: Path, place: str) -> None:
    with pytest.raises(FetchError, match=r"redirects to '\S+', which is not followed"):
        fetch(site.put("/bundle.zip", location=place), target)
    with pytest.raises(FetchError, match="is not an address that begins with"):
        fetch(place, target)
    assert not target.parent.exists() or left_behind(target) == []


def test_endless_redirects_end(site: Site, target: Path) -> None:
    url = site.put("/bundle.zip", location="/bundle.zip")
    with pytest.raises(FetchError, match="the server answers 302"):
        fetch(url, target)


def test_encoded_body_is_refused(site: Site, target: Path) -> None:
    with pytest.raises(FetchError, match="comes encoded as 'gzip'"):
        fetch(site.put("/bundle.zip", BODY, encoding="gzip"), target)


def test_web_page_in_place_of_the_file(site: Site, target: Path) -> None:
    """As Google Drive answers when many have asked, and a proxy of the house when it must not be."""
    with pytest.raises(FetchError, match="answers with a web page in place of the file"):
        fetch(site.put("/bundle.zip", b"<html>quota exceeded</html>", kind="text/html; charset=utf-8"), target)
    assert left_behind(target) == []


def test_secrets_of_an_address_are_not_told(site: Site, target: Path) -> None:
    assert shown("https://user:secret@host:8443/a/b.zip?token=secret#x") == "https://host:8443/a/b.zip"
    with pytest.raises(FetchError) as refusal:
        fetch(site.url + "/none?token=secret", target)
    assert "secret" not in str(refusal.value)
    fetch(
        site.put("/bundle.zip", BODY, cuts=[1000, 10, 10]) + "?token=secret", target, limits=replace(LIMITS, attempts=9)
    )
    for path in target.parent.iterdir():
        assert b"token" not in path.read_bytes()


def test_two_at_once_are_told_apart(site: Site, target: Path) -> None:
    target.parent.mkdir()
    with target.with_name("bundle.zip.part").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="is being written by another radnode"):
            fetch(site.put("/bundle.zip", BODY), target)
    fetch(site.url + "/bundle.zip", target)
    assert target.read_bytes() == BODY


def test_text(site: Site) -> None:
    assert fetch_text(site.put("/index.json", '{"ä": 1}'.encode()), limits=LIMITS) == '{"ä": 1}'
    with pytest.raises(FetchError, match="is not text"):
        fetch_text(site.put("/index.json", b"\xff\xfe"), limits=LIMITS)
    with pytest.raises(FetchError, match="more than 100 are not taken"):
        fetch_text(site.put("/index.json", b"x" * 101), size_max=100, limits=LIMITS)


@pytest.mark.parametrize("text", ["a" * 64, "SHA256:" + "A" * 64, "sha256:" + "a" * 64 + "\n"])
def test_checksum_as_people_write_it(text: str) -> None:
    assert Checksum.of(text) == Checksum("sha256", "a" * 64)


@pytest.mark.parametrize("text", ["", "a" * 63, "g" * 64, "sha1:" + "a" * 64, "sha256:"])
def test_what_is_no_checksum(text: str) -> None:
    with pytest.raises(FetchError, match="is no checksum"):
        Checksum.of(text)
