"""A PostgreSQL server of the tests' own, on a free port, with its data in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.demo.pacs import free_port


def find_program(name: str) -> str:
    """A program of the PostgreSQL server; Debian keeps it out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    program = str(places[0]) if places else shutil.which(name)
    assert program, f"{name} is not installed (Debian: apt-get install postgresql)"
    return program


@contextmanager
def running_postgresql() -> Iterator[str]:
    """Start a server; the SQLAlchemy URL of its database `postgres`. As root it takes another user, who could not enter
    pytest's own temporary folders.
    """
    with tempfile.TemporaryDirectory(prefix="radnode-postgresql-") as name:
        yield from _serve(Path(name))


def _serve(folder: Path) -> Iterator[str]:
    port = free_port()
    data = folder / "data"
    as_user: dict[str, int] = {}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid}

    def run(*command: str) -> None:
        done = subprocess.run(
            command, **as_user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )  # pyright: ignore
        assert done.returncode == 0, done.stderr

    run(find_program("initdb"), "-D", str(data), "-U", "radnode", "--auth=trust", "-E", "UTF8", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=60"
    run(find_program("pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://radnode@127.0.0.1:{port}/postgres"
    finally:
        run(find_program("pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
