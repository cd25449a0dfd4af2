"""Translates the `Config` of the vendor's GRPO recipes into a run file, its source read as data.

Two spellings are known: the older one nests `weight_sync`, `infra` and `runner`, the newer one is
flat. What has no meaning here is told, with what to set instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from hotload.trainers.declaration import AsyncTrainingSpec, TrainingSpec
from hotload.trainers.refused_fields import REFUSED_TRAINING_FIELDS

LIMIT_BYTES = 1 << 20
CONFIG = "Config"
OLDER_PARTS = {"infra", "weight_sync", "runner"}

SAME_NAME = {
    "cycle.sampling": (
        *("completions_per_prompt", "max_completion_tokens", "temperature", "max_seq_len"),
        "max_head_offpolicy_versions",
    ),
    "cycle.sampling.groups": ("min_group_size", "max_incomplete_group_retries"),
    "cycle.problems": ("dataset", "max_rows"),
    "training.windows": (
        *("epochs", "shuffle", "seed", "prompt_groups_per_step", "weight_sync_interval"),
    ),
    "training.loss": ("policy_loss", "kl_beta"),
    "training.schedule": ("learning_rate",),
    "training.step": ("ppo_n_minibatches",),
    "training": ("dcp_save_interval", "pipeline_chunks_per_step"),
}
# Where a field of the recipes is here, by its name within the parts it is nested in.
PLACES: Mapping[str, str] = {
    **{name: f"{part}.{name}" for part, names in SAME_NAME.items() for name in names},
    **{
        f"weight_sync.{name}": place
        for name, place in {
            "weight_sync_interval": "training.windows.weight_sync_interval",
            "dcp_save_interval": "training.dcp_save_interval",
            "weight_sync_timeout": "cycle.readiness.weight_sync_timeout",
            "max_concurrent": "cycle.sampling.concurrency.max_concurrency",
        }.items()
    },
    "weight_sync_timeout": "cycle.readiness.weight_sync_timeout",
    "max_concurrency_rollout_sample": "cycle.sampling.concurrency.max_concurrency",
    "grad_clip_norm": "training.step.adam.grad_clip_norm",
    "deployment.deployment_id": "blocks.account.deployment_id",
    "deployment.sample_timeout": "cycle.sampling.sample_timeout",
    "deployment.replica_count": "cycle.readiness.replica_count",
    **{f"wandb.{name}": f"cycle.wandb.{name}" for name in ("entity", "project", "run_name")},
}
# Parameters of one loss: where they are, if it is the one that is chosen.
OF_A_LOSS: Mapping[str, Mapping[str, str]] = {
    "grpo": {"eps_clip": "eps_clip", "eps_clip_high": "eps_clip_high"},
    "importance_sampling": {"ratio_log_cap": "ratio_log_cap"},
    "dapo": {
        "dapo.eps_clip": "eps_clip",
        "dapo.eps_clip_high": "eps_clip_high",
        "dapo.eps_clip_c": "dual_clip",
        "dapo.ratio_log_cap": "ratio_log_cap",
    },
    "dro": {"dro.beta": "dro_beta"},
    "gspo": {"gspo.clip_ratio_low": "eps_clip", "gspo.clip_ratio_high": "eps_clip_high"},
    "cispo": {"cispo.eps_low": "eps_clip", "cispo.eps_high": "eps_clip_high"},
    "reinforce": {},
}
PARAMETERS_OF_LOSSES = {name: loss for loss, names in OF_A_LOSS.items() for name in names}
# What the recipes do where nothing is said, and a run file does not.
DEFAULTS = {
    "prompt_groups_per_step": 1,
    "max_rows": 100,
    "policy_loss": "grpo",
    "kl_beta": 0.001,
    "anchor_logp": "old_policy",
}
OLDER_DEFAULTS = {**DEFAULTS, "shuffle": False, "weight_sync.dcp_save_interval": 0}
NEWER_DEFAULTS = {
    **DEFAULTS,
    "dcp_save_interval": 10,
    "grad_accumulation_normalization": None,
}
REASONS: Mapping[str, str] = {
    "base_model": "the trainer is your own: name its weights in `training.trainer.arguments`, and "
    "the service's model in `blocks.account.model_id`",
    "log_path": "records lie in the store, `cycle.work_dir` is a directory of this machine",
    "trajectory_dir": "samples lie in the store as Parquet: docs/rollouts.md",
    "deployment.tokenizer_model": "prompts are tokenized by the service",
    "runner": "metrics lie in the store: docs/cycle.md",
    "deployment": "the service exists beforehand; nothing here creates one",
    "trainer": "the trainer is your own: name it in `training.trainer`",
    "weight_sync.first_checkpoint_type": "the first snapshot is always a full one",
    "weight_sync.dcp_timeout": "a limit of your trainer's: one of its arguments",
    "weight_sync.weight_sync_before_training": "the start weights are always published first",
    "init_from_checkpoint": "here it names `RUN:STEP` of a run with step records",
    "lr_scheduler": "set `training.schedule.lr_scheduler`: constant, linear or cosine",
    "warm_start_from_adapter": "the weights that your trainer begins with are its own",
    "router_replay_completion_only": "so it is: a prompt has the trainer's own routes",
    "lora_alpha": "the trainer is your own: one of its arguments",
}


@dataclass(slots=True)
class TranslatedConfig:
    """A run file made of a recipe's `Config`."""

    document: dict[str, Any]
    """`blocks:`, `cycle:` and `training:`."""
    notes: list[str] = field(default_factory=list)
    """What was left out, with the reason or what to set instead; what is refused of the rest."""

    @property
    def is_ahead(self) -> bool:
        """Whether the asynchronous loop runs it."""
        sampling = self.document["cycle"].get("sampling", {})
        return bool(sampling.get("max_head_offpolicy_versions"))

    def render(self) -> str:
        """Write the run file, what was left out above it."""
        module = "flows.async_rl_loop" if self.is_ahead else "flows.rl_loop"
        lines = [f"# python -m {module} THIS_FILE", "# Put in the names in capitals."]
        if self.notes:
            lines += ["# Left out, or to be mended:", *(f"#   {note}" for note in self.notes)]
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.document, sort_keys=False)


def translate_config(source: bytes, name: str) -> TranslatedConfig:
    """Translate the `Config(…)` that a Python file makes, or the defaults of its `class Config`.

    The file is parsed, and never run. A value that is no literal is told and left out.

    Args:
        name: of the file, for errors.

    Raises:
        ValueError: it is too large, no Python, or has no `Config`, or several.
    """
    given, unread = read_config(source, name)
    is_older = any(one.partition(".")[0] in OLDER_PARTS for one in given)
    values = (OLDER_DEFAULTS if is_older else NEWER_DEFAULTS) | given
    made = TranslatedConfig(
        {
            "blocks": {
                "account": {
                    "account_id": "ACCOUNT",
                    "model_id": "MODEL",
                    "deployment_id": "DEPLOYMENT",
                },
                "store": {"url": "s3://BUCKET/ACCOUNT/ACCOUNT-DEPLOYMENT"},
            },
            "cycle": {
                "run_id": "RUN",
                "work_dir": "/var/lib/hotload",
                "problems": {"dataset": "/data/problems.jsonl"},
            },
            "training": {"trainer": {"name": "TEAM", "arguments": {}}},
        }
    )
    made.notes += [f"{one}: no literal value (line {line}); set it by hand" for one, line in unread]
    loss = str(values["policy_loss"])
    if loss not in OF_A_LOSS:
        made.notes.append(
            f"policy_loss {loss}: no such loss here; {', '.join(OF_A_LOSS)} are known"
        )
        del values["policy_loss"]
    elif loss not in ("grpo", "reinforce") and values.pop("kl_beta", 0):
        _set(made.document, "training.loss.kl_beta", 0)
        made.notes.append(f"kl_beta: the recipe computes no KL with {loss}; here it would act")
    for one, reason in list(_without_effect(values, loss)):
        made.notes.append(f"{one}: {reason}")
        del values[one]
    for one, value in values.items():
        _translate(made, one, value, loss)
    made.notes += [f"refused as it stands: {reason}" for reason in _refusals(made)]
    return made


def _without_effect(values: Mapping[str, object], loss: str) -> Iterator[tuple[str, str]]:
    """Find what would be refused beside what else is said: a field, and why."""
    is_ahead = bool(values.get("max_head_offpolicy_versions"))
    for one, value in values.items():
        name = one.rpartition(".")[2]
        if one.startswith("tis.") and loss == "reinforce":
            yield one, "has no effect with reinforce, whose ratio corrects"
        elif one.startswith("tis.") and values["anchor_logp"] == "rollout":
            yield one, "has no effect with anchor rollout"
        elif name == "weight_sync_interval" and is_ahead and value != 1:
            yield one, "every step of an asynchronous loop publishes"
        elif name == "pipeline_chunks_per_step" and not is_ahead:
            yield one, "acts in the asynchronous loop alone: set `max_head_offpolicy_versions`"


def _refusals(made: TranslatedConfig) -> Iterator[str]:
    """Say what is still refused of the run file, whatever is put in for the names in capitals."""
    model = AsyncTrainingSpec if made.is_ahead else TrainingSpec
    training = made.document["training"] | {"trainer": {"name": "team.trainer:open_trainer"}}
    try:
        model.model_validate(training | {"cycle": made.document["cycle"]})
    except ValidationError as error:
        for one in error.errors(include_url=False):
            where = ".".join(map(str, one["loc"]))
            yield f"{where}: {one['msg']}" if where else one["msg"]


def _translate(made: TranslatedConfig, one: str, value: object, loss: str) -> None:
    """Set one field of the run file, or say why there is none."""
    place = PLACES.get(one)
    of_loss = PARAMETERS_OF_LOSSES.get(one)
    if of_loss is not None:
        if of_loss != loss:
            made.notes.append(f"{one}: has no effect with policy_loss {loss}")
        elif value is not None:
            _set(made.document, f"training.loss.{OF_A_LOSS[loss][one]}", value)
    elif one == "grad_accumulation_normalization":
        mode = "none" if value is None else str(value).lower()
        _set(made.document, f"training.step.{one}", mode)
    elif one == "anchor_logp":
        _set(made.document, "training.loss.anchor", "rollout" if value == "rollout" else "trainer")
    elif one in ("tis.cap", "tis.level"):
        _set(made.document, f"training.loss.{one}", value)
    elif one == "output_model_id" and isinstance(value, str):
        _set(made.document, "training.output_model_id", value.rpartition("/")[2])
    elif one == "dataset" and not _is_absolute(value):
        made.notes.append(f"dataset {value!r}: expected an absolute path or a URL")
    elif place is not None:
        # 0 and None are the recipes' words for no limit, and for what is not said.
        if value is not None and not (place.endswith("max_concurrency") and value == 0):
            _set(made.document, place, value)
    elif value is not None and value is not False and value != {}:
        made.notes.append(f"{one}: {_reason(one)}")


def _is_absolute(value: object) -> bool:
    return isinstance(value, str) and (value.startswith("/") or "://" in value)


def _reason(one: str) -> str:
    first, _, _ = one.partition(".")
    last = one.rpartition(".")[2]
    known = (REASONS.get(one), REFUSED_TRAINING_FIELDS.get(last), REASONS.get(first))
    fallback = REFUSED_TRAINING_FIELDS.get(first, "has no meaning here")
    return next((reason for reason in known if reason), fallback)


def _set(document: dict[str, Any], place: str, value: object) -> None:
    *parts, last = place.split(".")
    for part in parts:
        document = document.setdefault(part, {})
    document[last] = value


def read_config(source: bytes, name: str) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Read the fields of a `Config` by their names, those of nested parts as `part.field`; and
    those whose values are no literals, with their lines.

    Raises:
        ValueError: as `translate_config`.
    """
    if len(source) > LIMIT_BYTES:
        raise ValueError(f"{name} is larger than {LIMIT_BYTES} bytes: not a recipe")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ValueError(f"{name} is not Python{where}") from None
    nodes = list(ast.walk(tree))
    classes = [one for one in nodes if isinstance(one, ast.ClassDef) and one.name == CONFIG]
    calls = [one for one in nodes if isinstance(one, ast.Call) and _called(one) == CONFIG]
    if len(classes) > 1 or len(calls) > 1:
        lines = ", ".join(map(str, [one.lineno for one in classes] + [one.lineno for one in calls]))
        raise ValueError(f"{name} has several of `{CONFIG}`, at lines {lines}: keep one")
    if not classes and not calls:
        raise ValueError(f"{name} has neither `{CONFIG}(…)` nor `class {CONFIG}`")
    found: dict[str, Any] = {}
    unread: dict[str, int] = {}
    for one, value in [*_class_fields(classes), *_call_fields(calls)]:
        # What the call says comes after the class's defaults, and takes their place.
        for each in [known for known in found if known == one or known.startswith(f"{one}.")]:
            del found[each]
        unread.pop(one, None)
        for path, node in _leaves(one, value):
            try:
                found[path] = _literal(node)
            except (ValueError, TypeError, RecursionError, MemoryError):
                unread[path] = node.lineno
    return found, list(unread.items())


def _class_fields(classes: list[ast.ClassDef]) -> Iterator[tuple[str, ast.expr]]:
    for node in (statement for one in classes for statement in one.body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
            yield node.target.id, node.value


def _call_fields(calls: list[ast.Call]) -> Iterator[tuple[str, ast.expr]]:
    for call in calls:
        if call.args:
            yield "log_path", call.args[0]
        for keyword in call.keywords:
            yield keyword.arg or "**", keyword.value


def _leaves(path: str, node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Walk through `Part(…)`, `field(default_factory=Part)` and `lambda: Part(…)`."""
    if isinstance(node, ast.Lambda):
        yield from _leaves(path, node.body)
    elif isinstance(node, ast.Call) and _called(node) == "field":
        for keyword in node.keywords:
            if keyword.arg == "default" or isinstance(keyword.value, ast.Lambda):
                yield from _leaves(path, keyword.value)
    elif isinstance(node, ast.Call) and _called(node)[:1].isupper() and not node.args:
        for keyword in node.keywords:
            yield from _leaves(f"{path}.{keyword.arg or '**'}", keyword.value)
    else:
        yield path, node


def _literal(node: ast.expr) -> object:
    """Take a literal, or the name of an enum's member: `GradAccNormalization.NUM_LOSS_TOKENS`."""
    if isinstance(node, ast.Attribute) and node.attr.isupper() and isinstance(node.value, ast.Name):
        return node.attr.lower()
    value = ast.literal_eval(node)
    if value is None or isinstance(value, str | int | float | bool | list | dict):
        return value
    raise ValueError


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
