"""What deployments/ starts in containers exists, and takes the options it is given."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from agent.__main__ import _parser as agent_parser
from agent.door.__main__ import _parser as door_parser
from examples.processes import IN_BATCHES
from tests.containers.files import ROOT, services, steps

PARSERS = {"agent": agent_parser, "agent.door": door_parser}
MANIFESTS: list[dict[str, Any]] = [
    *yaml.safe_load_all((ROOT / "deployments/kubernetes.yaml").read_text())
]


def in_pods() -> dict[str, dict[str, Any]]:
    """Containers of the manifests by name."""
    pods = [one["spec"]["template"]["spec"] for one in MANIFESTS if one["kind"] == "Deployment"]
    found = [one for pod in pods for one in [*pod.get("initContainers", []), *pod["containers"]]]
    return {one["name"]: one for one in found}


IN_COMPOSE = services({"HOTLOAD_BUCKET": "s3://bucket"})
COMMANDS = {f"compose: {name}": one.words for name, one in IN_COMPOSE.items()} | {
    f"kubernetes: {name}": one["command"] for name, one in in_pods().items() if "command" in one
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_one_that_its_program_takes(words: list[str]) -> None:
    if words[:2] == ["python", "-m"]:
        parser: ArgumentParser = PARSERS[words[2]]()
        parser.parse_args(words[3:])
    elif words[0] == "sh":
        assert words[2].endswith("python -m flows.serve")
        assert find_spec("flows.serve")
    else:
        assert words[0] in ("prefect", "--model")


def test_both_start_the_same_services() -> None:
    assert IN_COMPOSE.keys() == in_pods().keys()
    of = {name: one for name, one in in_pods().items() if name in ("server", "cycles")}
    assert {name: IN_COMPOSE[name].words for name in of} == {
        name: one["command"] for name, one in of.items()
    }


def test_the_image_has_what_the_services_run() -> None:
    copied = {rest.split()[0] for word, rest in steps() if word == "COPY"}
    packages = {"hotload", "agent", "emulator", "blocks", "tasks", "flows", "examples"}
    assert packages <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert [rest for word, rest in steps() if word == "USER"] == ["hotload"]


def test_a_server_in_a_pod_writes_in_batches() -> None:
    (settings,) = (one["data"] for one in MANIFESTS if one["kind"] == "ConfigMap")
    assert settings.items() >= IN_BATCHES.items()


def test_every_container_of_ours_reads_its_root_only() -> None:
    ours = [one for one in in_pods().values() if one["image"].startswith("hotload")]
    assert len(ours) == 4
    assert all(one["securityContext"]["readOnlyRootFilesystem"] for one in ours)
    assert all(one.is_read_only for one in IN_COMPOSE.values() if one.image == "hotload")
