"""Cycle files: a whole cycle in one YAML file, for a run from the shell.

    blocks:                        # only what is not configured on the Prefect server
      account:  {base_url: …, account_id: …, model_id: …, deployment_id: …}
      store:    {url: …}
      service:  {…}                # what it has beside the account, and so the rollouts
      rollouts: {…}
    cycle:                         # the fields of CycleSpec
      checkpoint: /checkpoints/grpo7/000012
      …

Keys and credentials stay in the environment, or in blocks saved on the server.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prefect.blocks.core import Block
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from blocks import require_server
from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from hotload.cli.cycle_file import read_cycle_file, read_run_file
from hotload.declared_file import field_meant, part_model
from hotload.errors import did_you_mean, shorten
from hotload.identity import slug
from hotload.spec import CycleSpec
from hotload.trainers.declaration import TrainingSpec

BLOCKS: dict[str, type[Block]] = {
    "service": HotLoadService,
    "store": CheckpointStore,
    "checkpoint_store": CheckpointStore,
    "rollouts": RolloutClient,
}
OF_THE_ACCOUNT = ("service", "rollouts")
# What examples/cycle.yaml has in place of names: a cycle would look for such a host for minutes.
PLACEHOLDER = re.compile(
    r"ACCOUNT|MODEL|DEPLOYMENT|RUN|TEAM|/checkpoints/RUN/\d+"
    r"|[a-z0-9]+://(?:.*[/-])?(?:BUCKET|ACCOUNT|DEPLOYMENT)(?:[/-].*)?"
)
EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "model": "a mapping",
    "list": "a list",
    "tuple": "a list",
}
"""What a field takes, by the first word of pydantic's name for the error."""
OF_TEXT = ("string", "dict", "model", "list", "tuple")
YAML_KINDS = {str: "text", dict: "a mapping", list: "a list", type(None): "nothing"}
Model = TypeVar("Model", bound=BaseModel)
SpecT = TypeVar("SpecT", bound=CycleSpec)
TrainingSpecT = TypeVar("TrainingSpecT", bound=TrainingSpec)


async def load_cycle_file(path: Path) -> CycleSpec:
    """Load the cycle that a file declares, its inline blocks saved on the Prefect server.

    Raises:
        ValueError, OSError: as `parse_cycle_file`.
        ServiceUnavailableError: as `save_inline_blocks`.
    """
    return await save_inline_blocks(*await asyncio.to_thread(parse_cycle_file, path))


async def save_inline_blocks(spec: SpecT, blocks: dict[str, Block]) -> SpecT:
    """Save the inline blocks of a cycle, under a name that no person has configured.

    Raises:
        ServiceUnavailableError: the Prefect server does not answer.
    """
    await require_server()
    # A cycle loads its blocks again by name, so files that declare other blocks need other names.
    declared = [
        spec.run_id,
        *(f"{kind} {block.model_dump_json()}" for kind, block in blocks.items()),
    ]
    digest = hashlib.sha256(json.dumps(declared).encode()).hexdigest()[:8]
    name = f"file-{slug(spec.run_id)}-{digest}"
    for block in blocks.values():
        await block.save(name, overwrite=True)
    return spec.model_copy(update=dict.fromkeys(blocks, name))


def parse_cycle_file(path: Path) -> tuple[CycleSpec, dict[str, Block]]:
    """Parse the cycle that a file declares, and its inline blocks by the spec's field that names
    them.

    Raises:
        ValueError: the file is not a cycle file; says which field, without its value.
        OSError: the file cannot be read.
    """
    cycle, inline = read_cycle_file(path)
    _refuse_placeholders(path, {"cycle": cycle, "blocks": inline})
    return checked(CycleSpec, cycle, f"{path}: cycle"), _parse_blocks(inline, path)


def parse_run_file(
    path: Path, model: type[TrainingSpecT]
) -> tuple[TrainingSpecT, dict[str, Block]]:
    """Parse the training run that a file declares, and its inline blocks, as `parse_cycle_file`
    does: a cycle file without what the loop sets, with `training:` beside `cycle:`.

    Raises:
        ValueError, OSError: as `parse_cycle_file`.
    """
    cycle, training, inline = read_run_file(path)
    _refuse_placeholders(path, {"cycle": cycle, "training": training, "blocks": inline})
    checked(part_model(model, "cycle"), cycle, f"{path}: cycle")
    spec = checked(model, {**training, "cycle": cycle}, f"{path}: training")
    return spec, _parse_blocks(inline, path)


def _refuse_placeholders(path: Path, document: Mapping[object, object]) -> None:
    if left := [*_placeholders(document, "")]:
        raise ValueError("\n".join([f"{path} has names of the example: put in yours", *left]))


def _parse_blocks(inline: dict[str, Any], path: Path) -> dict[str, Block]:
    if "account" in inline:
        account = checked(InferenceAccount, inline.pop("account"), f"{path}: blocks.account")
        for kind in OF_THE_ACCOUNT:
            own = inline.get(kind) or {}
            if isinstance(own, dict) and "account" in own:
                raise ValueError(
                    f"{path}: blocks.{kind}.account: it belongs in blocks.account; or leave that"
                    " out, and give service and rollouts an account each"
                )
            inline[kind] = {"account": account, **own} if isinstance(own, dict) else own
    service, store = inline.get("service"), inline.get("store")
    if isinstance(service, dict) and service.get("agents") and isinstance(store, dict):
        checked_store = checked(CheckpointStore, store, f"{path}: blocks.store")
        inline["service"] = {"store": checked_store, **service}
    for kind in OF_THE_ACCOUNT:
        own = inline.get(kind)
        if isinstance(own, dict) and isinstance(own.get("account"), dict):
            place = f"{path}: blocks.{kind}.account"
            inline[kind] = {**own, "account": checked(InferenceAccount, own["account"], place)}
    return {kind: checked(BLOCKS[kind], inline[kind], f"{path}: blocks.{kind}") for kind in inline}


def checked(model: type[Model], given: object, place: str) -> Model:
    """Parse `given` as the model.

    Raises:
        ValueError: with every finding, and without a value that may be a key.
    """
    if isinstance(given, dict):
        # Prefect's blocks take fields they do not know, and would save a misspelt key in clear.
        unknown = given.keys() - model.model_fields.keys() if issubclass(model, Block) else set()
        if unknown:
            found = sorted(map(str, unknown))
            hint = did_you_mean(found[0], model.model_fields)
            raise ValueError(f"{place}: unknown {found}{hint}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        lines = [
            f"  {'.'.join(map(str, one['loc'])) or 'all'}: {_found(one, issubclass(model, Block))}"
            + (field_meant(model, one["loc"]) if one["type"] == "extra_forbidden" else "")
            for one in faults
        ]
        raise ValueError("\n".join([f"{place} is refused", *lines])) from None


def _found(fault: ErrorDetails, is_block: bool) -> str:
    """Say what was found and what was expected. Text is shown only where a number or one of a few
    words was expected, and not in a block: elsewhere it may be a key."""
    kind, given = fault["type"].partition("_")[0], fault["input"]
    expected = EXPECTED.get(kind) or fault["msg"].removeprefix("Input should be ")
    if kind not in EXPECTED and expected == fault["msg"]:
        return expected
    found = YAML_KINDS.get(type(given), type(given).__name__)
    if kind == "string" and isinstance(given, str):
        return f"found text, which {fault['msg'].removeprefix('String ')}"
    if isinstance(given, (bool, int, float)):
        found = json.dumps(given)
    elif isinstance(given, str) and kind not in OF_TEXT and not is_block:
        found = f"{shorten(given)} (str)"
    return f"found {found}, expected {expected}"


def _placeholders(part: Mapping[object, object], place: str) -> Iterator[str]:
    """Name every field that still has a name of the example."""
    for name, value in part.items():
        if isinstance(value, dict):
            yield from _placeholders(value, f"{place}{name}.")
        elif isinstance(value, str) and PLACEHOLDER.fullmatch(value):
            yield f"  {place}{name}: {value}"
