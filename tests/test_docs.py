"""Documents that must not drift from the code."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.draw_losses import PICTURES, draw
from examples.processes import IN_BATCHES
from hotload.publish.chain import TRANSITIONS
from hotload.training.policy_loss import PARAMETERS, PolicyLoss
from hotload.training.resume import RESUMPTION

ROOT = Path(__file__).resolve().parents[1]
README_WORDS = 900
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "deployments" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGES = ("hotload", "emulator", "blocks", "tasks", "flows", "examples")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_picture_of_the_chain_is_drawn_from_the_table() -> None:
    drawn = "\n".join(
        f"    {before.value} --> {after.value}: {event.value}"
        for (before, event), after in TRANSITIONS.items()
    )
    page = (ROOT / "docs" / "chain.md").read_text()
    assert f"stateDiagram-v2\n{drawn}\n" in page, f"docs/chain.md should show:\n{drawn}"


def test_the_page_of_a_step_shows_what_is_done_with_the_trainer() -> None:
    page = (ROOT / "docs" / "resume.md").read_text()
    rows = "\n".join(
        f"| {found.value} | {', then '.join(leg.value for leg in legs)} |"
        for found, legs in RESUMPTION.items()
    )
    assert f"|---|---|\n{rows}\n" in page, f"docs/resume.md should show:\n{rows}"


def test_the_page_of_losses_shows_the_defaults_in_force() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    rows = []
    for name, takes in PARAMETERS.items():
        loss = PolicyLoss(policy_loss=name)
        in_force = [(each, getattr(loss, each)) for each in (*takes, "kl_beta")]
        shown = ", ".join(
            f"`{each}` {'off' if value is None else f'{value:g}'}" for each, value in in_force
        )
        rows.append(f"| `{name}` | {shown} |")
    drawn = "\n".join(rows)
    assert f"\n{drawn}\n" in page, f"docs/losses.md should show:\n{drawn}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_import_that_is_shown_works(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "decisions" not in page.parts], ids=named
)
def test_every_module_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    packages = "|".join(PACKAGES)
    for name in re.findall(rf"`((?:{packages})(?:/\w+)+\.py)", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(rf"`((?:{packages})(?:\.\w+)+)[:`(]", text):
        module, _, attribute = name.rpartition(".")
        path = ROOT / name.replace(".", "/")
        if name.startswith(("hotload.snapshot.", "hotload.cycle.")):
            continue  # an event
        if path.with_suffix(".py").is_file() or path.is_dir():
            continue
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_pictures_of_the_losses_are_what_the_losses_do() -> None:
    page = (ROOT / "docs" / "losses.md").read_text()
    for name in PARAMETERS:
        assert f"](pictures/{name}.svg)" in page
        assert (PICTURES / f"{name}.svg").read_text() == draw(name), "benchmarks.draw_losses"


def test_a_server_is_started_everywhere_with_the_same_settings() -> None:
    lines = (ROOT / "deployments/sqlite.env").read_text().splitlines()
    assert dict(line.split("=") for line in lines) == IN_BATCHES
    compose = yaml.safe_load((ROOT / "deployments/compose.yaml").read_text())
    assert compose["services"]["server"]["environment"].items() >= IN_BATCHES.items()
    for page in (ROOT / "docs").glob("*.md"):
        starts = re.findall(r"(.*)prefect server start", page.read_text())
        assert all("env $(cat deployments/sqlite.env)" in one for one in starts), page
