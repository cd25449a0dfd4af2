"""The three ways in: through the Prefect API, from its command line, and from a cycle file.

Everything is real: a server, `make deploy`, a process worker, the emulator behind HTTP.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from flows.cycle import checkpoint_to_rollout
from hotload.clients.trigger import publish
from hotload.errors import IdentityConflictError
from hotload.spec import RetentionSpec
from tests.flows.fleet import API_KEY, NAMES, Fleet, running_fleet, save_blocks
from tests.programs import running
from tests.servers import LoopbackServer
from tests.signals import signals_are_heard
from tests.waiting import PATIENCE_SECONDS, until, wait_until

ROOT = Path(__file__).parents[2]
DEPLOYMENT = "checkpoint-to-rollout/process"
SERVED = "checkpoint-to-rollout/served"
END_SECONDS = 300
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

pytestmark = [
    pytest.mark.timeout(900),  # the first test waits for `make deploy` and the worker
    # Prefect leaves its own connections to its API to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command that ends; its output as text. One that does not fails with what it had said."""
    try:
        return subprocess.run(
            arguments,
            cwd=cwd,
            env=os.environ | {"NO_COLOR": "1", **environment},
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
        )
    except subprocess.TimeoutExpired as late:
        said = b"\n".join(filter(None, (late.stdout, late.stderr))).decode(errors="replace")
        pytest.fail(f"{' '.join(arguments)} did not end within {END_SECONDS} s:\n{said}")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", *arguments, **environment)


@pytest.fixture(scope="session")
def deployed(prefect_api: str) -> str:
    """The address of the process deployment, made by `make deploy`."""
    made = run("make", "-o", "install", "deploy", f"PY={sys.executable}")
    assert made.returncode == 0, made.stdout + made.stderr
    return found(prefect_api, DEPLOYMENT)


@pytest.fixture(scope="session")
def worker(deployed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A worker of the process pool; one for all tests."""

    def command(port: int) -> list[str]:
        return [
            *("env", f"PREFECT_WORKER_WEBSERVER_PORT={port}", "PREFECT_WORKER_QUERY_SECONDS=0.5"),
            *(sys.executable, "-m", "prefect", "worker", "start", "--with-healthcheck"),
            *("--pool", "hotload-process", "--name", "tests", "--limit", "1"),
        ]

    server = LoopbackServer("worker", tmp_path_factory.mktemp("worker"), command)
    server.start()
    server.wait()
    yield
    server.stop()


@pytest.fixture(scope="session")
def served(prefect_api: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m flows.serve`, once its deployment is there."""
    server = subprocess.Popen([sys.executable, "-m", "flows.serve"], cwd=ROOT)
    address = f"{prefect_api}/deployments/name/{SERVED}"

    def is_there() -> bool:
        assert server.poll() is None
        return httpx.get(address, timeout=PATIENCE_SECONDS).status_code == 200

    wait_until(is_there)
    yield server
    server.terminate()
    server.wait(timeout=60)


@pytest.fixture
async def http(prefect_api: str) -> AsyncIterator[httpx.AsyncClient]:
    """A trainer without Prefect's package."""
    async with httpx.AsyncClient(base_url=prefect_api, timeout=PATIENCE_SECONDS) as client:
        yield client


@pytest.fixture
async def slow_fleet(
    prefect_api: str, tmp_path: Path, checkpoints: list[Path]
) -> AsyncIterator[Fleet]:
    """A fleet whose replicas take an hour for every step of a load."""
    name = f"slow-{uuid.uuid4().hex[:12]}"
    root = tmp_path / "slow"
    root.mkdir()
    with running_fleet(name, root, checkpoints, seconds_per_state=3600.0) as running:
        await save_blocks(running)
        yield running


def found(prefect_api: str, deployment: str) -> str:
    """The address of a deployment."""
    answer = httpx.get(
        f"{prefect_api}/deployments/name/{deployment}", timeout=PATIENCE_SECONDS
    ).raise_for_status()
    return f"{prefect_api}/deployments/{answer.json()['id']}"


def declared(fleet: Fleet, version: int, **changes: Any) -> dict[str, Any]:
    """A cycle of a run that no other test has: keys are known to the whole server."""
    return fleet.declared(version, run_id=fleet.name, **changes)


def cycle_file(fleet: Fleet, version: int, name: str = "cycle.yaml", **changes: Any) -> str:
    """A cycle file that uses the fleet's saved blocks."""
    path = fleet.root / name
    path.write_text(yaml.safe_dump({"cycle": declared(fleet, version, **changes)}))
    return str(path)


def said(ended: subprocess.CompletedProcess[str]) -> str:
    """What a command told as its error, apart from Prefect's log."""
    return f"\n{ended.stderr}".rpartition("\nerror: ")[2]


def is_served(fleet: Fleet) -> bool:
    """Whether every replica serves what the one ended cycle published, after one signal."""
    (report,) = fleet.reports()
    return fleet.served() == {report.snapshot.identity} and len(fleet.log()["signals"]) == 1


async def send(http: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
    """The first answer that is not 503, a locked SQLite file: as every trainer has to ask."""

    async def ask() -> httpx.Response | None:
        answer = await http.request(method, path, json=body)
        return None if answer.status_code == 503 else answer

    answer = await until(ask)
    assert answer is not None
    return answer


async def post(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    return await send(http, "POST", path, body)


async def ended(http: httpx.AsyncClient, run_id: str) -> dict[str, Any]:
    """A flow run that has ended, asked for again and again.

    Prefect's own waits follow events instead, and one that is lost on the way, while a connection
    is made anew and the event is not yet stored, is waited for without end.
    """

    async def look() -> dict[str, Any] | None:
        answer = await http.get(f"/flow_runs/{run_id}")
        run: dict[str, Any] = answer.json() if answer.status_code == 200 else {"state": None}
        return run if run["state"] and run["state"]["type"] in FINAL else None

    try:
        run = await until(look, END_SECONDS)
    except TimeoutError:
        states = (await http.get("/flow_run_states/", params={"flow_run_id": run_id})).text
        pytest.fail(f"flow run {run_id} did not end within {END_SECONDS} s: {states}")
    assert run is not None
    return run


async def planned_runs(http: httpx.AsyncClient, deployment_id: str) -> list[dict[str, Any]]:
    """The runs that the server's scheduler has planned, the last first; it looks now and then."""
    ours = {
        "deployment_id": {"any_": [deployment_id]},
        "state": {"name": {"any_": ["Scheduled"]}},
    }

    async def look() -> list[dict[str, Any]]:
        asked = {"flow_runs": ours, "sort": "EXPECTED_START_TIME_DESC"}
        return (await post(http, "/flow_runs/filter", asked)).json()

    return await until(look)


async def test_a_trainer_triggers_by_http_and_repeats_itself(
    fleet: Fleet, worker: None, deployed: str, http: httpx.AsyncClient
) -> None:
    spec = declared(fleet, 1)
    key = f"cycle/{DEPLOYMENT}/{fleet.name}-000001/1"
    body = {"parameters": {"spec": spec}, "idempotency_key": key}
    made = await post(http, f"{deployed}/create_flow_run", body)
    again = await post(http, f"{deployed}/create_flow_run", body)
    assert (made.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == made.json()["id"]

    done = await ended(http, made.json()["id"])
    assert (done["name"], done["state"]["name"]) == (f"{fleet.name}-000001", "Completed")
    assert is_served(fleet)
    known = await post(http, f"{deployed}/create_flow_run", body)
    assert known.json()["state"]["name"] == "Completed"

    # Another attempt makes another run, which finds that nothing is left to do.
    key = f"cycle/{DEPLOYMENT}/{fleet.name}-000001/2"
    second = await post(http, f"{deployed}/create_flow_run", body | {"idempotency_key": key})
    done = await ended(http, second.json()["id"])
    assert done["state"]["name"] == "AlreadyServed"
    assert is_served(fleet)


async def test_a_person_switches_the_schedule_on(
    fleet: Fleet, worker: None, deployed: str, http: httpx.AsyncClient
) -> None:
    deployment = (await http.get(deployed)).json()
    (schedule,) = deployment["schedules"]
    assert not schedule["active"]
    switch = f"{deployed}/schedules/{schedule['id']}"
    saved = {"spec": declared(fleet, 1)}
    # In this order: the scheduler plans at once, with the parameters that are saved by then.
    await send(http, "PATCH", deployed, {"parameters": saved})
    await send(http, "PATCH", switch, {"active": True})
    try:
        planned = await planned_runs(http, deployment["id"])
        assert all(each["auto_scheduled"] and each["parameters"] == saved for each in planned)
        now = {"state": {"type": "SCHEDULED", "name": "Scheduled"}, "force": True}
        await post(http, f"/flow_runs/{planned[0]['id']}/set_state", now)
        done = await ended(http, planned[0]["id"])
    finally:  # or what is planned is run beside the tests that follow
        await send(http, "PATCH", switch, {"active": False})
        await send(http, "PATCH", deployed, {"parameters": {}})
    assert done["state"]["name"] in {"Completed", "AlreadyServed"}  # another may have been due
    assert is_served(fleet)


async def test_the_api_refuses_parameters_that_are_no_cycle(
    fleet: Fleet, deployed: str, http: httpx.AsyncClient
) -> None:
    for spec in (
        {"checkpoint": "/c"},
        declared(fleet, 1, policy_version=-1),
        declared(fleet, 1, kl=1),
    ):
        body = {"parameters": {"spec": spec}}
        refused = await post(http, f"{deployed}/create_flow_run", body)
        assert refused.status_code == 409
        assert "spec" in refused.json()["detail"]


def test_a_trainer_triggers_in_python(fleet: Fleet, worker: None, prefect_api: str) -> None:
    file = cycle_file(fleet, 1)
    first = python("examples.trigger", file, "--deployment", DEPLOYMENT)
    assert first.returncode == 0, first.stderr
    cycle = declared(fleet, 1)
    again = publish(prefect_api, cycle, deployment=DEPLOYMENT)
    assert again.is_completed
    assert first.stdout == f"{again.name} {again.id}: Completed\n"
    assert is_served(fleet)
    with pytest.raises(IdentityConflictError, match="triggered with other parameters"):
        publish(prefect_api, cycle | {"store": "x"}, deployment=DEPLOYMENT)
    with pytest.raises(ValueError, match="no deployment nobody/made-this"):
        publish(prefect_api, cycle, deployment="nobody/made-this")


async def test_a_served_flow_runs_cycles_in_processes_that_may_be_killed(
    slow_fleet: Fleet,
    fleet: Fleet,
    served: subprocess.Popen[bytes],
    prefect_api: str,
    http: httpx.AsyncClient,
) -> None:
    deployment = found(prefect_api, SERVED)
    before = set(psutil.Process(served.pid).children(recursive=True))
    body = {"parameters": {"spec": declared(slow_fleet, 1)}}
    killed = await post(http, f"{deployment}/create_flow_run", body)
    await asyncio.to_thread(wait_until, lambda: slow_fleet.log()["signals"])
    # Forked by the warm process, which lives on; the process of the rewards is a child of its own.
    new = set(psutil.Process(served.pid).children(recursive=True)) - before
    (cycle,) = (each for each in new if each.parent() in before)
    cycle.kill()
    done = await ended(http, killed.json()["id"])
    assert done["state"]["name"] == "Crashed"

    body = {"parameters": {"spec": declared(fleet, 1)}}
    made = await post(http, f"{deployment}/create_flow_run", body)
    done = await ended(http, made.json()["id"])
    assert done["state"]["name"] == "Completed"
    assert is_served(fleet)
    assert before <= set(psutil.Process(served.pid).children(recursive=True))


async def run_by_hand(spec: dict[str, Any], http: httpx.AsyncClient) -> dict[str, Any]:
    """The run that a person started from the command line, once it has ended."""
    command = ("prefect", "deployment", "run", DEPLOYMENT, "--param", f"spec={json.dumps(spec)}")
    made = await asyncio.to_thread(python, *command)
    assert made.returncode == 0, made.stdout + made.stderr
    (run_id,) = set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", made.stdout))
    return await ended(http, run_id)


async def test_a_person_runs_the_deployment_from_the_command_line(
    fleet: Fleet, worker: None, http: httpx.AsyncClient
) -> None:
    done = await run_by_hand(declared(fleet, 1), http)
    assert done["state"]["name"] == "Completed"
    assert is_served(fleet)


async def test_a_failed_run_of_the_deployment_says_why(
    fleet: Fleet, worker: None, http: httpx.AsyncClient
) -> None:
    done = await run_by_hand(declared(fleet, 1, checkpoint=str(fleet.root / "nothing")), http)
    assert done["state"]["name"] == "Failed"
    assert "nothing" in done["state"]["message"]
    assert not fleet.log()["signals"]


async def test_a_second_trigger_waits_for_the_first_on_a_worker_of_one(
    fleet: Fleet, worker: None, deployed: str, http: httpx.AsyncClient
) -> None:
    made = [
        await post(
            http, f"{deployed}/create_flow_run", {"parameters": {"spec": declared(fleet, version)}}
        )
        for version in (1, 2)
    ]
    done = [await ended(http, one.json()["id"]) for one in made]
    assert [one["state"]["name"] for one in done] == ["Completed"] * 2
    assert done[1]["start_time"] >= done[0]["end_time"]
    assert len(fleet.reports()) == 2


def test_a_developer_runs_a_cycle_file_with_blocks_of_its_own(fleet: Fleet) -> None:
    account = {"base_url": fleet.url, **NAMES}
    blocks = {"account": account, "store": {"url": fleet.bucket.as_uri()}}
    file = fleet.root / "cycle.yaml"
    file.write_text(yaml.safe_dump({"blocks": blocks, "cycle": declared(fleet, 1)}))
    done = python("flows", str(file), FIREWORKS_API_KEY=API_KEY)
    assert done.returncode == 0, done.stderr
    assert is_served(fleet)
    assert f"identity  {fleet.reports()[0].snapshot.identity}" in done.stdout
    assert API_KEY not in done.stdout + done.stderr


async def test_a_rollback_is_one_command(fleet: Fleet) -> None:
    for version in (1, 2):
        await checkpoint_to_rollout(fleet.spec(version, run_id=fleet.name))
    file = cycle_file(fleet, 2)
    back = await asyncio.to_thread(python, "flows.rollback", file, "1")
    assert back.returncode == 0, back.stderr
    (served,) = fleet.served()
    assert f"{served} is served by 2 replicas" in back.stdout
    assert str(served).startswith(f"{fleet.name}-000001-")
    refused = await asyncio.to_thread(python, "flows.rollback", file, "7")
    assert (refused.returncode, "has no snapshot of it" in said(refused)) == (1, True)


def test_a_cycle_that_cannot_succeed_exits_1_and_says_why(fleet: Fleet) -> None:
    torn = fleet.root / "torn"
    shutil.copytree(fleet.checkpoints[1], torn)
    shard = sorted(torn.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    refused = python("flows", cycle_file(fleet, 1, checkpoint=str(torn)))
    assert refused.returncode == 1
    assert shard.name in said(refused)
    assert not fleet.log()["signals"]


def test_all_that_is_wrong_is_told_once_and_nothing_is_published(fleet: Fleet) -> None:
    rows = fleet.root / "no_answers.jsonl"
    rows.write_text('{"id": 2, "prompt": [1, 2], "solution": 4}\n{"prompt": [5], "solution": 4}\n')
    broken = fleet.root / "broken"
    shutil.copytree(fleet.checkpoints[1], broken)
    (broken / "config.json").write_text("{")
    file = cycle_file(
        fleet,
        1,
        checkpoint=str(broken),
        problems={"dataset": str(rows)},
        reward={"name": "numeric_answer"},
        sampling={"rollout": {"name": "nowhere:play"}},
    )
    ended = python("flows", file)
    assert ended.returncode == 1, said(ended)
    for fault in ("config.json", "cannot use the answers of 2 of 2 rows", "nowhere:play"):
        assert ended.stderr.count(fault) == 1, ended.stderr
    assert "`answer`: row 1 (id '2')" in ended.stderr
    assert "other fields of the first row: solution" in ended.stderr
    assert "Traceback" not in said(ended)
    assert not fleet.log()["signals"]


@signals_are_heard()
def test_one_cycle_at_a_time_and_ctrl_c_makes_room(slow_fleet: Fleet) -> None:
    with running("flows", cycle_file(slow_fleet, 1, "first.yaml")) as holder:
        wait_until(lambda: holder.poll() is not None or slow_fleet.log()["signals"])
        assert holder.poll() is None
        second = python("flows", cycle_file(slow_fleet, 2, "second.yaml"))
        assert second.returncode == 1
        assert f"{slow_fleet.name}-000001" in said(second)

        children = psutil.Process(holder.pid).children(recursive=True)
        holder.send_signal(signal.SIGINT)
        _, told = holder.communicate(timeout=PATIENCE_SECONDS)
    assert holder.returncode == 130
    assert told.endswith("stopped; start it again to go on\n")
    assert not psutil.wait_procs(children, timeout=PATIENCE_SECONDS)[1]
    assert [lease["released"] for lease in slow_fleet.leases()] == [True]
    assert len(slow_fleet.log()["signals"]) == 1


async def test_retention_is_deployed_as_a_dry_run_with_its_schedule_off(
    deployed: str, prefect_api: str, http: httpx.AsyncClient
) -> None:
    address = found(prefect_api, "retain/retention")
    deployment = (await http.get(address)).json()
    (schedule,) = deployment["schedules"]
    assert not schedule["active"]
    assert not RetentionSpec.model_validate(deployment["parameters"]["spec"]).delete
    body = {"parameters": {"spec": {"price_per_gb_month": -1}}}
    refused = await post(http, f"{address}/create_flow_run", body)
    assert refused.status_code == 409
    assert "price_per_gb_month" in refused.text


async def test_a_worker_runs_the_code_of_the_clone_and_not_what_is_installed(
    fleet: Fleet, worker: None, prefect_api: str, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    # This environment has `hotload` installed; the clone has one that can be told apart.
    origin, clone = tmp_path / "origin.git", tmp_path / "work"
    for package in ("hotload", "agent", "blocks", "tasks", "flows", "examples"):
        shutil.copytree(ROOT / package, clone / package)
    report = clone / "hotload/report/cycle_report.py"
    report.write_text(report.read_text().replace("facts = {", 'facts = {"library": __file__,'))
    document = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())
    (process,) = (each for each in document["deployments"] if each["name"] == "process")
    step = {"repository": origin.as_uri(), "branch": "main"}
    process |= {"name": "clone", "pull": [{"prefect.deployments.steps.git_clone": step}]}
    (clone / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [process]}))
    name = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
    for arguments in (
        ("init", "--quiet", "--initial-branch", "main"),
        ("add", "."),
        (*name, "commit", "--quiet", "--message", "clone"),
        ("clone", "--quiet", "--bare", ".", str(origin)),
    ):
        assert run("git", *arguments, cwd=clone).returncode == 0
    deploy = ("prefect", "--no-prompt", "deploy", "--all")
    made = run(sys.executable, "-m", *deploy, cwd=clone)
    assert made.returncode == 0, made.stdout
    shutil.rmtree(clone)

    deployment = found(prefect_api, "checkpoint-to-rollout/clone")
    body = {"parameters": {"spec": declared(fleet, 1)}}
    made_run = await post(http, f"{deployment}/create_flow_run", body)
    done = await ended(http, made_run.json()["id"])
    assert done["state"]["name"] == "Completed"
    assert is_served(fleet)
    key = {"artifacts": {"key": {"any_": [f"hotload-{fleet.name}"]}}}
    (shown,) = (await post(http, "/artifacts/filter", key)).json()
    (library,) = re.findall(r"\| library \| (\S+) \|", shown["data"].replace("\\", ""))
    assert not Path(library).is_relative_to(ROOT)
