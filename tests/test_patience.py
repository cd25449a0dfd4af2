"""No test fails because the machine is busy, or for where it was started: read from the syntax."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
CALLS_OUT = {
    *(f"httpx.{name}" for name in ("Client", "AsyncClient", "get", "post", "put", "delete")),
    *("httpx.request", "httpx.stream", "urlopen", "opener.open"),
}
SENDS = {"send_signal", "kill", "killpg", "pthread_kill", "raise_signal"}
ALWAYS_HEARD = {"signal.SIGKILL", "signal.SIGABRT"}
WAITS = {"wait", "join", "communicate", "timeout", "run", "wait_procs", "Barrier"}
BUSY_SECONDS = 60
"""What a busy machine may need where no Prefect server takes part; with one, PATIENCE_SECONDS."""
HANGS_SECONDS = 120


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _is_short(value: ast.expr | None) -> bool:
    """Whether it is a number of seconds that a busy machine may need; less is meant to pass."""
    number = value.value if isinstance(value, ast.Constant) else None
    return isinstance(number, int | float) and 1 <= number < BUSY_SECONDS


def _is_looking(parents: list[ast.AST]) -> bool:
    """Whether it is in a loop with a deadline."""
    loops = [node for node in parents if isinstance(node, ast.While)]
    return any("monotonic()" in ast.unparse(loop) for loop in loops) or any(
        isinstance(node, ast.AsyncWith) and "asyncio.timeout" in ast.unparse(node.items[0])
        for node in parents
    )


def faults(node: ast.AST, parents: list[ast.AST]) -> Iterator[str]:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CALLS_OUT and "timeout" not in keywords:
            yield f"line {node.lineno}: {name} waits for httpx's five seconds"
        if name in CALLS_OUT or last in WAITS:
            seconds = [] if last == "Barrier" else node.args[:1]
            for value in (keywords.get("timeout"), *seconds):
                if _is_short(value) and name != "pytest.mark.timeout":
                    yield f"line {node.lineno}: {name} waits for less than a minute"
        if name in ("time.sleep", "asyncio.sleep") and not _is_looking(parents):
            (seconds,) = node.args
            if isinstance(seconds, ast.Constant) and seconds.value:
                yield f"line {node.lineno}: {name}; wait for what it is there for"
        if name == "pytest.mark.timeout":
            (seconds,) = node.args
            if isinstance(seconds, ast.Constant) and seconds.value < HANGS_SECONDS:
                yield f"line {node.lineno}: {name} ends more than what hangs"
    if isinstance(node, ast.Assert) and "time.monotonic()" in ast.unparse(node):
        yield f"line {node.lineno}: a machine may be slow"
    for child in ast.iter_child_nodes(node):
        yield from faults(child, [*parents, node])


def deaf(node: ast.AST, parents: list[ast.AST]) -> Iterator[str]:
    """Signals that are sent although whoever started the tests may have let them be ignored."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in SENDS:
        may_be_ignored = node.args and ast.unparse(node.args[-1]) not in ALWAYS_HEARD
        tests = [one for one in parents if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
        heard = [ast.unparse(one) for test in tests for one in test.decorator_list]
        # What is awaited runs after a decorator has ended: there, a block starts the child.
        within = [one for test in tests for one in ast.walk(test) if isinstance(one, ast.With)]
        heard += [ast.unparse(item) for one in within for item in one.items]
        if may_be_ignored and "signals_are_heard()" not in heard:
            yield f"line {node.lineno}: without @signals_are_heard()"
    for child in ast.iter_child_nodes(node):
        yield from deaf(child, [*parents, node])


# Where time is a number, nobody waits: tests/simulation is left out.
@pytest.mark.parametrize(
    "path",
    [one for one in sources("tests", "examples", "benchmarks") if one.parent.name != "simulation"],
    ids=named,
)
def test_only_what_hangs_fails(path: Path) -> None:
    assert not [*faults(ast.parse(path.read_text(encoding="utf-8")), [])]


@pytest.mark.parametrize("path", sources("tests"), ids=named)
def test_signals_are_heard_wherever_the_tests_are_started(path: Path) -> None:
    assert not [*deaf(ast.parse(path.read_text(encoding="utf-8")), [])]


def test_the_default_time_limit_ends_only_what_hangs() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["pytest"]["ini_options"]["timeout"] > 2 * PATIENCE_SECONDS


@pytest.mark.parametrize(
    "line",
    [
        "httpx.get(url)",
        "httpx.Client(base_url=url, timeout=5)",
        "urlopen(url)",
        "program.wait(20)",
        "program.communicate(timeout=30)",
        "asyncio.timeout(10)",
        "time.sleep(0.05)",
        "while not done(): asyncio.sleep(0.1)",
        "@pytest.mark.timeout(60)\ndef test(): pass",
        "assert time.monotonic() - begun < 5",
    ],
)
def test_what_a_busy_machine_would_fail_is_found(line: str) -> None:
    assert [*faults(ast.parse(line), [])]


@pytest.mark.parametrize(
    "line",
    [
        "httpx.get(url, timeout=PATIENCE_SECONDS)",
        "program.wait(60)",
        "program.wait()",
        "asyncio.timeout(0.05)",
        "asyncio.sleep(0)",
        "while time.monotonic() < deadline: time.sleep(0.1)",
    ],
)
def test_patience_is_not_a_fault(line: str) -> None:
    assert not [*faults(ast.parse(line), [])]


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("child.send_signal(number)", True),
        ("os.killpg(child.pid, signal.SIGTERM)", True),
        ("child.send_signal(signal.SIGKILL)", False),
        ("child.kill()", False),
        ("@signals_are_heard()\ndef test(): child.send_signal(number)", False),
    ],
)
def test_a_signal_that_may_be_ignored_is_found(line: str, is_found: bool) -> None:
    assert bool([*deaf(ast.parse(line), [])]) is is_found
