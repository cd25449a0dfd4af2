"""Three policy versions sampled while the next ones are swapped in, on bad days: what the reports
count against what the emulator's own log of requests says. Not equal to the last one is a failure.

Each version samples every problem; once a quarter of a version lies in the store, the next is
published. Meanwhile the service refuses (425, 429 with and without Retry-After, 503), cuts streams
with and without the connection, and one replica is slow to swap. The log knows requests, not
versions: a request is a version's if a row of it has that request id.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import polars as pl

from examples.processes import emulator, prefect_server

if TYPE_CHECKING:
    from hotload.report.cycle_report import CycleReport
    from hotload.rollout.counts import RolloutSummary
    from hotload.spec import CycleSpec

VERSIONS = (1, 2, 3)
PARTS = 8
PARTS_BEFORE_THE_NEXT = 2
STORMS = 12
TOKENS = 16
WIDTH = 50
CUT = "499"  # how the log marks an answer that did not come to its end
NAMES = {"account_id": "bench", "model_id": "tiny", "deployment_id": "fleet"}
FLEET = ["--replicas", "3", "--engine", "stub", "--seconds-per-token", "0.04"]
FLEET += ["--seconds-per-state", "0.2"]
FLEET += ["--account", "bench", "--model", "tiny", "--deployment", "fleet"]
REFUSALS: tuple[dict[str, Any], ...] = (
    {"fault": "respond", "status": 425, "message": "hot loading"},
    {"fault": "respond", "status": 429},
    {"fault": "respond", "status": 429, "retry_after": 3},
    {"fault": "respond", "status": 503},
)
CUTS: tuple[dict[str, Any], ...] = (
    {"fault": "truncate_stream", "after_tokens": 5},
    {"fault": "truncate_stream", "after_tokens": 5, "abrupt": True},
)
SLOW_REPLICA: tuple[dict[str, Any], ...] = (
    {"fault": "lagging_replica", "replica": "replica-2", "seconds": 1.0},
    {"fault": "slow_swap", "replica": "replica-2", "seconds": 3.0},
)


Counts = dict[str, int]
"""What one side counted, line by line; lines that are set in add up to the one above them."""


def of_report(rollouts: "RolloutSummary") -> Counts:
    """What a cycle's report says."""
    met = rollouts.groups.failed_attempts
    return _lines(
        rollouts.groups.attempts,
        rollouts.groups.attempts - sum(met.values()),
        {status: count for status, count in met.items() if status.isdigit()},
        rollouts.samples_by_identity,
        samples=rollouts.sample_count,
        answered=rollouts.sample_count - sum(rollouts.failed_samples.values()),
        straddling=rollouts.groups.straddling_samples,
        tokens=rollouts.completion_token_count,
    )


def of_log(requests: Iterable[dict[str, Any]]) -> Counts:
    """What the emulator's records of requests say; those of one session are one sample."""
    requests = list(requests)
    whole = [each for each in requests if each["status"] == 200]
    met = [list(dict.fromkeys((r["identity_first"], r["identity_last"]))) for r in whole]
    statuses = Counter(str(each["status"]) for each in requests)
    return _lines(
        len(requests),
        len(whole),
        {status: count for status, count in statuses.items() if status not in ("200", CUT)},
        Counter(" → ".join(map(str, identities)) for identities in met),
        samples=len({each["session"] for each in requests}),
        answered=len({each["session"] for each in whole}),
        straddling=sum(len(identities) > 1 for identities in met),
        tokens=sum(each["completion_tokens"] for each in whole),
    )


def _lines(
    sent: int,
    whole: int,
    refused: Mapping[str, int],
    by_identity: Mapping[str, int],
    *,
    samples: int,
    answered: int,
    straddling: int,
    tokens: int,
) -> Counts:
    statuses = dict.fromkeys((str(each["status"]) for each in REFUSALS), 0) | dict(refused)
    return {
        "requests sent": sent,
        "  answered whole": whole,
        "  cut short": sent - whole - sum(refused.values()),
        **{f"  refused {status}": count for status, count in statuses.items()},
        "samples": samples,
        "samples answered": answered,
        **{f"  by {name}": by_identity[name] for name in sorted(by_identity)},
        "samples straddling": straddling,
        "tokens of whole answers": tokens,
    }


def total(sides: Iterable[Counts]) -> Counts:
    """The sum of several, line by line."""
    added: Counter[str] = Counter()
    for side in sides:
        added.update(side)  # `+` would leave out what is below 0
    return dict(added)


def storms(sample_count: int) -> list[dict[str, Any]]:
    """Every kind of refusal and of cut, a hundredth of all samples each, in twelve bursts."""
    size = max(1, sample_count // (100 * STORMS))
    return [
        {**fault, "count": size, "after": number * sample_count // STORMS}
        for number in range(STORMS)
        for fault in (*REFUSALS, *CUTS)
    ]


def spec_of(options: argparse.Namespace, root: Path, version: int) -> "CycleSpec":
    """The cycle of one version."""
    from hotload.spec import CycleSpec

    return CycleSpec.model_validate(
        {
            "checkpoint": str(root / "checkpoints" / f"{version:06d}"),
            "work_dir": str(root / "work"),
            "run_id": "swaps",
            "policy_version": version,
            **dict.fromkeys(("service", "store", "rollouts"), "swaps"),
            "problems": {"dataset": str(root / "problems.jsonl")},
            "readiness": {"poll_interval_seconds": 0.25, "warmup_after_hotload": False},
            "sampling": {
                "completions_per_prompt": options.samples,
                "max_completion_tokens": TOKENS,
                "max_head_offpolicy_versions": len(VERSIONS) - 1,
                "problems_per_task": -(-options.problems // PARTS),
                # No hedges and no deadlines: a request given up may never have reached the service.
                "concurrency": {"initial_window": 48, "min_window": 16, "max_window": 96},
            },
            "reward": {"name": "length", "arguments": {"target": TOKENS}},
        }
    )


async def run_cycles(options: argparse.Namespace, root: Path, url: str) -> "list[CycleReport]":
    """Three cycles, each begun while the one before still samples."""
    from blocks.account import InferenceAccount
    from blocks.checkpoint_store import CheckpointStore
    from blocks.hot_load_service import HotLoadService
    from blocks.rollout_client import RolloutClient
    from flows.cycle import checkpoint_to_rollout

    account = InferenceAccount(base_url=url, api_key="bench", **NAMES)
    service = HotLoadService(account=account, hot_load_transition_type=options.mode)
    for block in (
        service,
        RolloutClient(account=account),
        CheckpointStore(url=(root / "bucket").as_uri()),
    ):
        await block.save("swaps", overwrite=True)
    cycles: list[asyncio.Task[CycleReport]] = []
    for version in VERSIONS:
        cycle = asyncio.create_task(checkpoint_to_rollout(spec_of(options, root, version)))
        cycles.append(cycle)
        # The next begins by what the bucket holds, as another machine's trainer would see it.
        parts = partial(part_files, root, version)
        while not cycle.done() and len(parts()) < PARTS_BEFORE_THE_NEXT:
            await asyncio.wait([cycle], timeout=0.1)
    return await asyncio.gather(*cycles)


def part_files(root: Path, version: int) -> list[Path]:
    """The Parquet files of a version that are there."""
    rollouts = root / "bucket" / "_hotload" / "rollouts"
    return list(rollouts.glob(f"swaps-{version:06d}-*/part-*"))


def compare(
    reports: "list[CycleReport]",
    rows: list[pl.DataFrame],
    requests: list[dict[str, Any]],
    ordered: Mapping[str, int],
) -> list[str]:
    """Print both sides, version by version and in total; what is not equal.

    The log does not tell a stream that ended too soon from a broken connection, and the report
    does: it is held against what was `ordered`, by what an attempt meets.
    """
    version_of = {
        request_id: number
        for number, frame in enumerate(rows)
        for request_id in frame["request_id"]
    }
    logged: list[list[dict[str, Any]]] = [[] for _ in rows]
    strangers = [each for each in requests if each["request_id"] not in version_of]
    for each in requests:
        if each["request_id"] in version_of:
            logged[version_of[each["request_id"]]].append(each)
    wrong = [f"{len(strangers)} requests that no row knows"] if strangers else []
    reported = [of_report(report.rollouts) for report in reports]
    for report, frame, ours, log in zip(reports, rows, reported, logged, strict=True):
        name = f"version {report.policy_version}"
        wrong += table(f"{name}, {report.snapshot.identity}", ours, of_log(log))
        odd = len(told_by_rows(frame) ^ told_by_log(log))
        wrong += [f"{name}: {odd} lines, of a row or of the log, without their like"] * bool(odd)
    wrong += table("all versions", total(reported), of_log(requests))
    met = total(report.rollouts.groups.failed_attempts for report in reports)
    title = "what requests met; a drain adds 425s of its own"
    return wrong + table(title, met, ordered, against="ordered", or_more="425")


def met_as_ordered(faults: list[dict[str, Any]]) -> Counts:
    """What the faults that struck a request make it meet."""
    met: Counter[str] = Counter()
    for fault in faults:
        if fault["fault"] == "respond":
            met[str(fault["status"])] += fault["struck"]
        elif fault["fault"] == "truncate_stream":
            met["connection" if fault["abrupt"] else "truncated"] += fault["struck"]
    return met


def told_by_rows(frame: pl.DataFrame) -> set[tuple[Any, ...]]:
    """Request, its attempts, first and last identity of the answer: sample by sample."""
    columns = ("request_id", "attempts", "first_identity", "last_identity")
    return set(frame.select(columns).iter_rows())


def told_by_log(requests: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """The same of the requests; two whole answers to one would be one line too many."""
    attempts = Counter(each["request_id"] for each in requests)
    names = ("identity_first", "identity_last")
    return {
        (each["request_id"], attempts[each["request_id"]], *(each[name] for name in names))
        for each in requests
        if each["status"] == 200
    }


def table(
    title: str,
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
    *,
    against: str = "log",
    or_more: str | None = None,
) -> list[str]:
    """Print one table; its lines that are not equal.

    Args:
        or_more: the line where we may have more.
    """
    print(f"\n{title:{WIDTH}} {'report':>9} {against:>9}")
    wrong = []
    for name in dict(theirs) | dict(ours):
        one, other = ours.get(name, 0), theirs.get(name, 0)
        mark = "=" if one == other else ">" if name == or_more and one > other else "≠"
        print(f"{name:{WIDTH}} {one:9,} {other:9,}  {mark}")
        if mark == "≠":
            wrong.append(f"{title}: {name.strip()}: {one} reported, {other} {against}")
    return wrong


def check_conditions(
    options: argparse.Namespace,
    reports: "list[CycleReport]",
    faults: list[dict[str, Any]],
    log: dict[str, Any],
) -> list[str]:
    """What makes the run not the one it claims to be."""
    wrong = []
    straddling = sum(report.rollouts.groups.straddling_samples for report in reports)
    if options.mode == "SYNC" and straddling:
        wrong.append(f"{straddling} samples straddle a swap that drains")
    for report in reports[:-1]:
        if len(report.rollouts.samples_by_identity) < 2:
            wrong.append(f"no swap fell into the sampling of version {report.policy_version}")
    wrong += [f"never struck: {fault}" for fault in faults if not fault["struck"]]
    if log["client_bugs"]:
        wrong.append(f"client bugs: {log['client_bugs']}")
    return wrong


def main() -> int:
    """Run it and print the tables; 1 if anything is not equal."""
    parser = argparse.ArgumentParser(description="Reports against the service's own log.")
    parser.add_argument("--mode", choices=("ASYNC", "SYNC"), default="ASYNC", help="of the swaps")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=8, help="per problem and version")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "bucket").mkdir()
        problems = ({"id": n, "prompt": f"{n}: say ab"} for n in range(options.problems))
        (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
        with prefect_server(root / "prefect"):
            from examples.five_cycles import write_checkpoints

            base = write_checkpoints(root / "checkpoints", len(VERSIONS))[0]
            fleet = [*FLEET, "--transition", options.mode]
            bucket = (root / "bucket").as_uri()
            with emulator(bucket, base, root / "emulator.log", fleet) as url:
                orders = storms(len(VERSIONS) * options.problems * options.samples)
                body = {"faults": [*orders, *SLOW_REPLICA]}
                httpx.post(f"{url}/emulator/faults", json=body, timeout=60).raise_for_status()
                began = time.perf_counter()
                reports = asyncio.run(run_cycles(options, root, url))
                seconds = time.perf_counter() - began
                log = httpx.get(f"{url}/emulator/log", timeout=60).raise_for_status().json()
                faults = (
                    httpx.get(f"{url}/emulator/faults", timeout=60)
                    .raise_for_status()
                    .json()["faults"]
                )
        frames = [pl.read_parquet(part_files(root, version)) for version in VERSIONS]
    what = f"{options.problems} x {options.samples} samples x {len(VERSIONS)} versions"
    print(f"swaps under {options.mode}, {what}: {seconds:.0f} s")
    wrong = compare(
        reports,
        frames,
        [each for each in log["requests"] if each["session"]],
        met_as_ordered(faults),
    )
    wrong += check_conditions(options, reports, faults, log)
    verdict = ["NOT EQUAL", *wrong] if wrong else ["report and log agree in every count"]
    print("\n".join(["", *verdict]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
