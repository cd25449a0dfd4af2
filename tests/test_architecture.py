"""The rules of the house that no linter knows, read from the syntax trees and from the classes."""

import ast
import importlib
import importlib.metadata
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from hotload import errors
from hotload.errors import Finding, HotLoadError

ROOT = Path(__file__).parents[1]
PACKAGES = ("hotload", "agent", "emulator", "blocks", "tasks", "flows")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks", "deployments", "docs")
IMPURE = {
    "__main__.py",
    "cli",
    "clients",
    "clock.py",
    "declared_file.py",
    "directory",
    "sampling",
    "trainers",
}
MODULES_IN_A_FOLDER = 16
LONGEST_IMPORT_CHAIN = 9


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), named(path))


def calls(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Dotted text and line of every call."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def is_task(node: ast.AST) -> bool:
    """Whether a definition carries Prefect's task decorator."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return any(re.match(r"task\b", ast.unparse(decorator)) for decorator in node.decorator_list)


# Prefect loads a flow file as a top-level module with its folder first on the path.


@pytest.mark.parametrize("path", modules("flows", "tasks"), ids=named)
def test_no_stem_shadows_the_standard_library_or_an_installed_package(path: Path) -> None:
    taken = sys.stdlib_module_names | importlib.metadata.packages_distributions().keys()
    assert path.stem == "__init__" or path.stem not in taken - {"flows", "tasks"}
    assert path.stem not in PACKAGES


COMMAND_LINES = {"command_line.py", "cycle_file.py", "retain.py", "serve.py"}


@pytest.mark.parametrize("path", modules("flows"), ids=named)
def test_flows_define_no_class_and_catch_one_error(path: Path) -> None:
    for part in tree(path).body:
        is_main = isinstance(part, ast.FunctionDef) and part.name == "main"
        is_command_line = is_main or path.name in COMMAND_LINES
        for node in ast.walk(part):
            assert not isinstance(node, ast.ClassDef), f"line {node.lineno}: a class"
            if isinstance(node, ast.ExceptHandler) and not is_command_line:
                caught = "" if node.type is None else ast.unparse(node.type)
                assert caught == "NeedsFullSnapshotError", f"line {node.lineno}: catches {caught}"


def test_the_cycle_is_one_page_that_decides_one_thing() -> None:
    path = ROOT / "flows/cycle.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
    nodes = list(ast.walk(tree(path)))
    assert sum(isinstance(node, ast.If | ast.IfExp | ast.Match) for node in nodes) == 1
    assert not [node for node in nodes if isinstance(node, ast.Try | ast.While)]
    operators = [node.op for node in nodes if isinstance(node, ast.BinOp)]
    assert all(isinstance(operator, ast.BitOr) for operator in operators)  # of types


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_imports_are_absolute(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}"


def test_prefect_loads_the_same_flow_as_an_import() -> None:
    from prefect.flows import load_flow_from_entrypoint

    from flows.cycle import checkpoint_to_rollout

    loaded = load_flow_from_entrypoint(f"{ROOT / 'flows' / 'cycle.py'}:checkpoint_to_rollout")
    assert loaded.name == checkpoint_to_rollout.name
    assert inspect.signature(loaded.fn) == inspect.signature(checkpoint_to_rollout.fn)


# Who may do what.


@pytest.mark.parametrize("path", modules("hotload"), ids=named)
def test_the_pure_rooms_open_nothing_print_nothing_and_ask_no_clock(path: Path) -> None:
    if path.relative_to(ROOT / "hotload").parts[0] in IMPURE:
        return
    forbidden = re.compile(
        r"(open|print|input|exec|eval)$"
        r"|(.*\.)?(datetime|date)\.(now|utcnow|today)$"
        r"|.*\.(read_text|read_bytes|write_text|write_bytes|mkdir|unlink|sleep)$"
    )
    found = [f"line {line}: {text}" for text, line in calls(tree(path)) if forbidden.match(text)]
    assert not found


def test_the_inference_client_loads_no_engine() -> None:
    script = "import sys, hotload.clients.inference.client\nsys.exit('prefect' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", modules(*set(PACKAGES) - {"tasks"}), ids=named)
def test_only_tasks_retry(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword):
            assert node.arg not in {"retries", "retry_condition_fn"}, f"line {node.value.lineno}"
        # What a client library would repeat by itself is set to one attempt.
        attempts: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Dict):
            keys = [ast.unparse(key) if key else "**" for key in node.keys]
            attempts = [*zip(keys, node.values, strict=True)]
        elif isinstance(node, ast.Assign):
            attempts = [(ast.unparse(target), node.value) for target in node.targets]
        for name, value in attempts:
            if re.search(r"max_attempts'$|\.retries$", name):
                assert ast.unparse(value) == "1", f"line {value.lineno}: {name}"


@pytest.mark.parametrize("path", modules("tasks"), ids=named)
def test_no_task_uses_another_task(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tasks."):
            other = ROOT / f"{node.module}.py".replace(".", "/", str(node.module).count("."))
            taken = {one.name for one in ast.walk(tree(other)) if is_task(one)}  # type: ignore[attr-defined]
            assert not taken & {alias.name for alias in node.names}, f"line {node.lineno}"


def imports_within(package: str) -> dict[str, set[str]]:
    """Every module of a package, with those of it that it imports at any level of its code."""
    names = {
        ".".join(path.with_suffix("").relative_to(ROOT).parts): path for path in modules(package)
    }
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in names else str(node.module))
        graph[name] = found & names.keys() - {name}
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_in_no_circle(package: str) -> None:
    tuple(TopologicalSorter(imports_within(package)).static_order())


def test_import_chains_inside_the_library_are_short() -> None:
    graph = imports_within("hotload")
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        below = max((chains[other] for other in graph[name]), key=len, default=[])
        chains[name] = [name, *below]
    longest = max(chains.values(), key=len)
    assert len(longest) <= LONGEST_IMPORT_CHAIN, " -> ".join(longest)


def test_no_folder_of_the_product_is_crowded() -> None:
    folders = Counter(path.parent for path in modules(*PACKAGES))
    assert max(folders.values()) <= MODULES_IN_A_FOLDER, folders.most_common(3)


@pytest.mark.parametrize(
    "path", [path for path in modules(*PACKAGES) if path.name == "__init__.py"], ids=named
)
def test_a_room_that_lists_its_modules_lists_them_all(path: Path) -> None:
    room = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
    there = {one.name for one in pkgutil.iter_modules([str(path.parent)])} - {"__main__"}
    listed = {name for name in room.__all__ if not callable(getattr(room, name, None))}
    assert not there & listed or there <= listed


def test_the_floors_hold() -> None:
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_codec_user_pays_for_no_data_frame_and_no_engine() -> None:
    script = (
        "import sys, hotload, hotload.delta\n"
        "heavy = {'polars', 'pandera', 'prefect', 'fsspec', 'httpx'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_trainer_pays_for_no_engine_and_before_it_reads_for_no_data_frame() -> None:
    script = (
        "import sys, hotload.clients.handoff\n"
        "heavy = {'polars', 'pandera', 'prefect', 'httpx', 's3fs', 'gcsfs'} & set(sys.modules)\n"
        "sys.exit(' '.join(sorted(heavy)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "the module"
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_"):
            assert ast.get_docstring(node), f"line {node.lineno}: {node.name}"


def test_no_file_names_a_path_of_one_machine() -> None:
    machine = re.compile(r"/(?:roo[t]|hom[e]|User[s]|wor[k])/\w")
    listed = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found = []
    for path in [*listed, *ROOT.glob("*"), *ROOT.glob(".ci/*")]:
        if path.name == ".git":  # in a second working tree a file that names the first
            continue
        if path.is_file() and path.suffix in {"", ".py", ".md", ".toml", ".yaml", ".yml", ".lock"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if machine.search(line):
                    found.append(f"{named(path)}:{number}: {line.strip()[:120]}")
    assert not found


# Errors travel between processes.

FINDING = Finding("dtype", "a.safetensors", "w", "F16", "BF16")
EXAMPLES: dict[type[HotLoadError], HotLoadError] = {
    type(error): error
    for error in (
        HotLoadError("why"),
        errors.InvalidCheckpointError((FINDING,)),
        errors.InvalidIdentityError("a/b", "it has a slash"),
        errors.IdentityConflictError("run-000001-0123abcd", "other content"),
        errors.InvalidProblemsError("problems.jsonl", 3, "no prompt"),
        errors.InvalidInputError(("checkpoint refused", "problems refused")),
        errors.DeltaError("a.safetensors, tensor w", "two frames"),
        errors.ChecksumMismatchError("a.safetensors, tensor w", "1", "2"),
        errors.NeedsFullSnapshotError("first snapshot"),
        errors.LayoutMismatchError("dtype of w changed"),
        errors.ChainBrokenError("run-000001-0123abcd", "run-000002-0123abcd"),
        errors.BaselineLostError("run-000001-0123abcd", "no directory"),
        errors.LoadFailedError("run-000001-0123abcd", "replica 2: merge failed"),
        errors.SelfCheckError("a.safetensors", "w: checksum is 1, expected 2"),
        errors.RolloutsFailedError("run-000001-0123abcd", "timeout 4", "no answer"),
        errors.ReadinessTimeoutError("run-000001-0123abcd", "2 of 3 replicas"),
        errors.FullSnapshotFailedError("run-000001-0123abcd", "replica 2: no space"),
        errors.ServicesFailedError("run-000001", "2 of 2 services", "acme/b: no replica"),
        errors.LeaseLostError("host-7", "token 4 after 3"),
        errors.RolloutFunctionError("mine:play", "is not async"),
        errors.RewardError("rewards:exact", "not a function"),
        errors.TrainerError("mine:open_trainer", "its gradient is not finite"),
        errors.StoreError("bucket/key", "access denied"),
        errors.StoreUnavailableError("bucket/key", "connection reset"),
        errors.ServiceError("signal", None, "refused"),
        errors.ServiceUnavailableError("observe", 503, "busy"),
        errors.ServiceRefusedError("observe", 401, "no key"),
        errors.SnapshotRejectedError("signal", 400, "unknown previous"),
        errors.ProtocolError("observe", 200, "not JSON"),
    )
}


def error_classes(root: type[HotLoadError] = HotLoadError) -> list[type[HotLoadError]]:
    below = [one for child in root.__subclasses__() for one in error_classes(child)]
    return [root, *(one for one in below if one.__module__ == errors.__name__)]


@pytest.mark.parametrize("error_class", sorted(set(error_classes()), key=lambda one: one.__name__))
def test_every_error_survives_pickling(error_class: type[HotLoadError]) -> None:
    assert error_class in EXAMPLES, "give it an example"
    error = EXAMPLES[error_class]
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert copy.args == error.args
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert error_class.__name__.endswith("Error")


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__ or ""))
    built_in = {"ValueError", "TimeoutError", "OSError"}
    assert drawn - built_in == {one.__name__ for one in error_classes()}


# One word for one thing: docs/design.md has the glossary.

SEVERAL_MEANINGS = {"main"}


def public_names(module: ast.Module) -> Iterator[str]:
    """Every public class, function and type alias at the top of a module."""
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0].isupper() and not name.isupper():
                yield name


def test_every_public_name_has_one_meaning_in_the_product() -> None:
    homes: dict[str, list[str]] = {}
    for path in modules(*PACKAGES):
        for name in set(public_names(tree(path))):
            if not name.startswith("_") and name not in SEVERAL_MEANINGS:
                homes.setdefault(name, []).append(named(path))
    assert not {name: found for name, found in homes.items() if len(found) > 1}


# What does not say what a function does: it begins with a verb, and its object follows.
NO_VERB = re.compile(
    r"(?:The|A|An|What|Whether|How|Why|Where|Which|Every|Each|All|As|If|When|None|No|One|Whatever|Two"
    r"|Seconds|Bytes|Nothing|Text|Cached|Another|Samples|Groups|Tokens?)\b"
)


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_a_docstring_of_a_function_begins_with_a_verb(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
            continue
        is_property = any("property" in ast.unparse(one) for one in node.decorator_list)
        if (text := ast.get_docstring(node)) and not is_property:
            assert not NO_VERB.match(text), f"line {node.lineno}: {node.name}: {text[:60]}"


def test_tasks_hold_tasks_and_blocks_hold_blocks() -> None:
    entries = {"__init__.py", "__main__.py"}
    for path in modules("tasks"):
        if path.name not in entries:
            assert any(is_task(node) for node in ast.walk(tree(path))), named(path)
    for path in modules("blocks"):
        if path.name not in entries:
            bases = [
                ast.unparse(base)
                for node in ast.walk(tree(path))
                if isinstance(node, ast.ClassDef)
                for base in node.bases
            ]
            assert "Block" in bases, named(path)


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules(*PACKAGES)}), ids=named)
def test_every_room_says_what_belongs_in_it_and_lists_its_surface(folder: Path) -> None:
    module = tree(folder / "__init__.py")
    assert ast.get_docstring(module)
    (surface,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    assert surface
    package = importlib.import_module(named(folder).replace("/", "."))
    for name in surface:
        is_module = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
        assert is_module or hasattr(package, name), name
