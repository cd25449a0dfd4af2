"""What a fresh clone relies on: the lock, the wheel, the Makefile, and what the README promises."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def locked() -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Every pinned requirement of the lock with its hashes, by canonical name."""
    pins: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for entry in LOCK.replace("\\\n", " ").splitlines():
        text, *hashes = entry.split("--hash=")
        pin = Requirement(text.strip())
        pins.setdefault(canonicalize_name(pin.name), []).append((pin, hashes))
    return pins


def test_the_lock_names_no_address_and_no_command() -> None:
    assert "://" not in LOCK
    assert not re.search(r"^\s*(#|--(?!hash=sha256:))", LOCK, re.MULTILINE)


def test_the_lock_pins_every_file_by_sha256() -> None:
    for name, pins in locked().items():
        for pin, hashes in pins:
            assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), name
            assert hashes, name
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text.strip()) for text in hashes), name


def test_the_lock_meets_what_the_project_asks_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    pins = locked()
    for text in [
        *PROJECT["project"]["dependencies"],
        *extras["clients"],
        *extras["pipeline"],
        *extras["dev"],
    ]:
        asked = Requirement(text)
        if asked.name == "hotload":
            continue  # with an extra: those are among them
        for pin, _ in pins[canonicalize_name(asked.name)]:
            (version,) = (one.version for one in pin.specifier)
            assert asked.specifier.contains(version), f"{text}: locked {version}"


def test_the_library_does_not_ask_for_the_engine() -> None:
    asked = {Requirement(text).name for text in PROJECT["project"]["dependencies"]}
    library = {"blake3", "numpy", "pydantic", "xxhash", "zlib-ng", "zstandard"}
    assert asked == library


def test_every_package_of_the_library_is_in_the_wheel_and_nothing_else(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hotload", "flows", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "."]
    subprocess.run([*build, "."], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    present = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "hotload").rglob("*")
        if path.suffix in {".py", ".jinja", ".css"} or path.name == "py.typed"
    }
    assert shipped == present


def test_every_module_a_make_target_runs_exists() -> None:
    ours = r"-m ((?:examples|benchmarks|tests|flows|agent|emulator)[\w.]*)"
    (lesson,) = re.findall(r"^LESSON := (\w+)$", MAKEFILE, re.MULTILINE)
    for name in re.findall(ours, MAKEFILE.replace("$(LESSON)", lesson)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_help_lists_every_target() -> None:
    run = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": ""},
    )
    declared = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert declared is not None
    for target in declared[1].split():
        assert f"make {target} " in run.stdout


def test_ci_runs_the_suite_and_hides_nothing() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -eu" in text
    assert "make test" in text
    assert "||" not in text


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readme_shows_the_commands(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_command_of_the_readme_exists() -> None:
    shown = re.findall(
        r"(?m)(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert set(shown) <= targets
