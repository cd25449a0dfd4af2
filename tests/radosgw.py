"""Runs a command with a Ceph object store on loopback: python -m tests.radosgw pytest -m stores

One monitor, one OSD in memory and one gateway in a temporary directory, ended with the command,
which finds the store in HOTLOAD_TEST_STORE_URL and HOTLOAD_TEST_STORE_OPTIONS. The programs are
Debian's (ceph-mon, ceph-osd, ceph-common, radosgw). Of the stores that run on a developer's machine
it is the most faithful to S3: it asks for signatures and refuses like AWS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.servers import BUCKET, LoopbackServer

PROGRAMS = ("monmaptool", "ceph-mon", "ceph-osd", "ceph", "radosgw", "radosgw-admin")
KEY, SECRET = "hotload-test-key", "hotload-test-secret"
CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{port}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {directory}
log_file = {directory}/$name.log
mon_data = {directory}/mon
osd_data = {directory}/osd
rgw_data = {directory}/rgw
mon_cluster_log_file = {directory}/cluster.log
mon_allow_pool_size_one = true
mon_data_avail_warn = 1
mon_data_avail_crit = 1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 4294967296
ms_mon_client_mode = crc
ms_bind_ipv6 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
rgw_dns_name = localhost
rgw_enable_usage_log = false
"""


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """A running gateway with one bucket; yields the environment that names it."""
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="hotload-ceph-", ignore_cleanup_errors=True)
            )
        )
        configuration = directory / "ceph.conf"

        def run(*command: str) -> str:
            return subprocess.run(
                [command[0], "--conf", str(configuration), *command[1:]],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
            ).stdout

        def start(name: str, *command: str) -> LoopbackServer:
            server = LoopbackServer(
                name,
                directory,
                lambda port: [
                    command[0],
                    "--conf",
                    str(configuration),
                    *(text.replace("PORT", str(port)) for text in command[1:]),
                ],
            )
            stack.callback(server.stop)
            return server

        monitor = start("mon", "ceph-mon", "--foreground", "--id", "a")
        fsid = str(uuid.uuid4())
        configuration.write_text(
            CONFIGURATION.format(fsid=fsid, port=monitor.port, directory=directory)
        )
        for name in ("mon", "osd", "rgw"):
            (directory / name).mkdir()
        monmap = str(directory / "monmap")
        address = f"[v2:127.0.0.1:{monitor.port}]"
        run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        run("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap)
        monitor.start()
        run("ceph", "--connect-timeout", "60", "osd", "new", fsid)
        run("ceph-osd", "--id", "0", "--mkfs", "--osd-uuid", fsid)
        start("osd", "ceph-osd", "--foreground", "--id", "0").start()
        gateway = start(
            "rgw",
            *("radosgw", "--foreground", "--name", "client.rgw"),
            *("--rgw-frontends", "beast endpoint=127.0.0.1:PORT"),
        )
        gateway.start()
        gateway.wait()
        run(
            *("radosgw-admin", "user", "create", "--uid", "hotload", "--display-name", "hotload"),
            *("--access-key", KEY, "--secret-key", SECRET),
        )
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=gateway.address,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        options = {"endpoint_url": gateway.address, "key": KEY, "secret": SECRET}
        yield {
            "HOTLOAD_TEST_STORE_URL": f"s3://{BUCKET}",
            "HOTLOAD_TEST_STORE_OPTIONS": json.dumps(options),
        }


def main(command: list[str]) -> int:
    """Run the command beside the store; its exit status, or 2 when a program is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        print(f"not installed: {' '.join(missing)}", file=sys.stderr)
        print("Debian: apt install ceph-mon ceph-osd ceph-common radosgw", file=sys.stderr)
        return 2
    with object_store() as store:
        return subprocess.run(command, env=os.environ | store).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
