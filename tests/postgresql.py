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


class PostgreSQL:
    """One server and its database `postgres`. As root it takes another user, who could not enter pytest's own temporary
    folders.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._port = free_port()
        self._user = self._group = None
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._user, self._group = user.pw_uid, user.pw_gid
        self._run(find_program("initdb"), "-D", "data", "-U", "radnode", "--auth=trust", "-E", "UTF8", "--no-sync")

    @property
    def url(self) -> str:
        """Its database, as SQLAlchemy and the configuration want it."""
        return f"postgresql+psycopg://radnode@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=60"
        self._run(find_program("pg_ctl"), "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        """End it as a crash does: at once, without a checkpoint, every connection cut."""
        self._run(find_program("pg_ctl"), "-D", "data", "-m", "immediate", "stop")

    def restart(self) -> None:
        """A crash and a new start, which recovers from the log."""
        self.stop()
        self.start()

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            user=self._user,
            group=self._group,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    """A server that runs, and is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="radnode-postgresql-") as name:
        server = PostgreSQL(Path(name))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def running_postgresql() -> Iterator[str]:
    """The same, for those who need the URL of its database only."""
    with postgresql_server() as server:
        yield server.url
