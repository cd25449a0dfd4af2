"""Runs a command with PostgreSQL behind Prefect's server: python -m tests.postgres pytest …

A cluster of its own in a temporary directory, on loopback, ended with the command, which finds its
URL in HOTLOAD_TEST_DATABASE. The programs are Debian's (postgresql-15).
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import LoopbackServer
from tests.waiting import wait_until

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
USER = "postgres"


@contextmanager
def database() -> Iterator[str]:
    """A running PostgreSQL with one empty database; yields its URL."""
    directory = Path(tempfile.mkdtemp(prefix="hotload-postgres-"))
    as_user: tuple[str, ...] = ()
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        account = pwd.getpwnam(USER)
        os.chown(directory, account.pw_uid, account.pw_gid)
        as_user = ("runuser", "-u", USER, "--")
    data = directory / "data"
    subprocess.run(
        [*as_user, PROGRAMS / "initdb", "-D", data, "-U", USER, "--auth=trust", "--no-sync"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )

    def command(port: int) -> list[str]:
        settings = (
            f"port={port}",
            "listen_addresses=127.0.0.1",
            "max_connections=200",
            "fsync=off",
        )
        options = [part for one in settings for part in ("-c", one)]
        return [*as_user, str(PROGRAMS / "postgres"), "-D", str(data), "-k", str(data), *options]

    server = LoopbackServer("postgres", directory, command)
    asks = [PROGRAMS / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(server.port)]
    try:
        server.start()
        wait_until(lambda: subprocess.run(asks).returncode == 0)
        yield f"postgresql+asyncpg://{USER}@127.0.0.1:{server.port}/{USER}"
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def main(command: list[str]) -> int:
    """Run the command beside the database; its exit status, or 0 and a line where none can be."""
    if not (PROGRAMS / "postgres").exists():
        print(f"skipped: no PostgreSQL 15 in {PROGRAMS}; Debian: apt install postgresql-15")
        return 0
    with database() as url:
        return subprocess.run(command, env=os.environ | {"HOTLOAD_TEST_DATABASE": url}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
