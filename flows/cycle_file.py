"""Cycle files: a whole cycle in one YAML file, for a run from the shell.

    blocks:                        # only what is not configured on the Prefect server
      service:  {base_url: …, account_id: …, model_id: …, deployment_id: …}
      store:    {url: …}
      rollouts: {base_url: …, account_id: …, model_id: …, deployment_id: …}
    cycle:                         # the fields of CycleSpec
      checkpoint: /checkpoints/grpo7/000012
      …

Keys and credentials stay in the environment, or in blocks saved on the server.
"""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import TypeVar

import yaml
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from pydantic import BaseModel, ValidationError

from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from hotload.errors import ServiceUnavailableError
from hotload.spec import CycleSpec

BLOCKS: dict[str, type[Block]] = {
    "service": HotLoadService,
    "store": CheckpointStore,
    "rollouts": RolloutClient,
}
LIMIT_BYTES = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


async def load_cycle_file(path: Path) -> CycleSpec:
    """Load the cycle that a file declares, its inline blocks saved on the Prefect server.

    Raises:
        ValueError, OSError: as `parse_cycle_file`.
        ServiceUnavailableError: as `save_inline_blocks`.
    """
    return await save_inline_blocks(*await asyncio.to_thread(parse_cycle_file, path))


async def save_inline_blocks(spec: CycleSpec, blocks: dict[str, Block]) -> CycleSpec:
    """Save the inline blocks of a cycle, under a name that no person has configured.

    Raises:
        ServiceUnavailableError: the Prefect server does not answer.
    """
    async with get_client() as client:
        if trouble := await client.api_healthcheck():
            reason = f"{client.api_url} does not answer: {trouble}"
            raise ServiceUnavailableError("Prefect server", None, reason)
    # A cycle loads its blocks again by name, so files that declare other blocks need other names.
    declared = [
        spec.run_id,
        *(f"{kind} {block.model_dump_json()}" for kind, block in blocks.items()),
    ]
    digest = hashlib.sha256(json.dumps(declared).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", spec.run_id.lower()).strip("-")
    name = f"file-{slug}-{digest}"
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
    if path.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"{path} is larger than {LIMIT_BYTES} bytes: not a cycle file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        # The error's own text quotes the line, and that may hold a secret.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else ""
        raise ValueError(f"{path} is not YAML{where}") from None
    if not isinstance(data, dict) or not isinstance(data.get("cycle"), dict):
        raise ValueError(f"{path}: expected a mapping with `cycle:` and, if needed, `blocks:`")
    inline = data.get("blocks") or {}
    if not isinstance(inline, dict):
        raise ValueError(f"{path}: expected a mapping below `blocks:`")
    unknown = sorted(map(str, (data.keys() - {"cycle", "blocks"}) | (inline.keys() - BLOCKS)))
    if unknown:
        known = ", ".join(BLOCKS)
        raise ValueError(f"{path}: unknown {unknown}; expected cycle, and blocks {known}")
    spec = _checked(CycleSpec, data["cycle"], f"{path}: cycle")
    blocks = {
        kind: _checked(BLOCKS[kind], inline[kind], f"{path}: blocks.{kind}") for kind in inline
    }
    return spec, blocks


def _checked(model: type[Model], given: object, place: str) -> Model:
    """`given` as the model; ValueError with every finding, and without a value."""
    if isinstance(given, dict):
        # Prefect's blocks take fields they do not know, and would save a misspelt key in clear.
        unknown = given.keys() - model.model_fields.keys() if issubclass(model, Block) else set()
        if unknown:
            raise ValueError(f"{place}: unknown {sorted(map(str, unknown))}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        lines = [f"  {'.'.join(map(str, one['loc'])) or 'all'}: {one['msg']}" for one in found]
        raise ValueError("\n".join([f"{place} is refused", *lines])) from None
