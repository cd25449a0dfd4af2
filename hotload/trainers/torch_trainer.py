"""Full-parameter training of any causal model of transformers: the extra `train`.

Named in a declaration as `hotload.trainers.torch_trainer:open_torch_trainer`. Masters are float32;
dropout is off, so nothing here draws a random number.

Started by torchrun, each of N processes holds its share of weights and optimizer (FSDP2) and
computes every Nth sequence. All make the same calls with the same values, and get the same results;
the first one writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as processes
import transformers

from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.directory.files import (
    copy_file,
    new_directory,
    read_whole,
    remove_tree,
    sync_and_replace,
    write_atomic,
)
from hotload.directory.relayout import view_checkpoint
from hotload.errors import StoreError, TrainerError
from hotload.rollout.routing import Routes
from hotload.trainers.base_digest import digest_base
from hotload.trainers.router_replay import RouterReplay
from hotload.trainers.saved_state import read_state, remove_state, write_state
from hotload.trainers.trainer import OptimizerFigures, TrainerFacts
from hotload.training.loss_inputs import PerToken
from hotload.training.schedule import AdamSettings
from hotload.training.settings import StateRef

ExportType = Literal["bfloat16", "float16"]
Ids = tuple[tuple[int, ...], ...]
Given = TypeVar("Given")
NO_SEQUENCE = ((0, 0),)  # what a process computes that has none: all take part in a forward


def open_torch_trainer(
    base_model: str,
    states: str,
    *,
    temperature: float = 1.0,
    export_dtype: ExportType = "bfloat16",
    compute_dtype: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    router_replay: bool = False,
    device: str | None = None,
    threads: int | None = None,
) -> TorchTrainer:
    """Load a checkpoint directory of a causal model for training.

    Args:
        states: the directory that states are written to and read from.
        temperature: the samples', at which log-probabilities are taken.
        compute_dtype: of forward and backward; the masters stay float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        router_replay: of a mixture of experts, send every token that was sampled to the experts
            that sampled it. Samples need their routes (`sampling.include_routing_matrix`).
        device: cuda where there is one, else the CPU.
        threads: of the whole process, on the CPU; another number gives other bits.

    Raises:
        TrainerError: routes are to be replayed, and no layer of the model has experts.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config = transformers.AutoConfig.from_pretrained(base_model, local_files_only=True)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base_model, config=config, dtype=torch.float32, local_files_only=True
    )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if is_sharded := int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not processes.is_initialized():
            processes.init_process_group("nccl" if kind == "cuda" else "gloo")
    model.to(torch.device(kind))
    replay = RouterReplay(model, Path(base_model).name) if router_replay else None
    if is_sharded:
        _shard(model, kind)
    if gradient_checkpointing:
        # It acts in training mode alone, and must not keep the graph of a frozen input.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train(gradient_checkpointing)
    return TorchTrainer(
        model, Path(base_model), Path(states), temperature, export_dtype, compute_dtype, replay
    )


def _shard(model: Any, kind: str) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh(kind, (processes.get_world_size(),))
    layers = set(model._no_split_modules or ())
    for each in model.modules():
        if type(each).__name__ in layers:
            fully_shard(each, mesh=mesh)
    fully_shard(model, mesh=mesh)


class TorchTrainer:
    """float32 masters with AdamW; what has one dimension does not decay."""

    def __init__(
        self,
        model: Any,
        base_model: Path,
        states: Path,
        temperature: float,
        export_dtype: ExportType,
        compute_dtype: Literal["float32", "bfloat16"],
        replay: RouterReplay | None = None,
    ) -> None:
        self.replays_routes = replay is not None
        self._replay = replay
        self._model, self._base, self._states = model, base_model, states
        self._base_sha256 = digest_base(base_model)
        self._temperature, self._export_dtype = temperature, export_dtype
        self._compute_dtype = compute_dtype
        self._masters: dict[str, Any] = dict(sorted(model.named_parameters()))
        ordered = list(self._masters.values())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [each for each in ordered if each.ndim > 1]},
                {"params": [each for each in ordered if each.ndim <= 1]},
            ]
        )
        for each in ordered:
            self._optimizer.state[each] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(each),
                "exp_avg_sq": torch.zeros_like(each),
            }
        self._kept: tuple[Ids, Sequence[Routes] | None, list[Any]] | None = None
        self._count = processes.get_world_size() if processes.is_initialized() else 1
        self._rank = processes.get_rank() if processes.is_initialized() else 0

    def describe(self) -> TrainerFacts:
        """Say what is trained, and with what."""
        device = self._model.device.type
        return TrainerFacts(
            model=self._base.name,
            base_sha256=self._base_sha256,
            parameter_count=sum(each.numel() for each in self._masters.values()),
            lora_rank=None,
            is_deterministic=device == "cpu",
            details={
                "trainer": "torch",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": device,
                "processes": self._count,
                "threads": torch.get_num_threads(),
                "compute_dtype": self._compute_dtype,
                "export_dtype": self._export_dtype,
                "temperature": self._temperature,
                "router_replay": self.replays_routes,
            },
        )

    def logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        is_before_backward: bool = False,
        routes: Sequence[Routes] | None = None,
    ) -> list[PerToken]:
        """Compute the log-probability of every token but the first, [N−1] each."""
        asked = self._checked(sequences, routes)
        self._kept = None
        with torch.set_grad_enabled(is_before_backward):
            found = self._forward(asked, routes)
        if is_before_backward:
            self._kept = (asked, routes, found)
        own = [each.detach().double().cpu().numpy() for each in found]
        if self._count == 1:
            return own
        parts: list[Any] = [None] * self._count
        processes.all_gather_object(parts, own)
        return [parts[n % self._count][n // self._count] for n in range(len(asked))]

    def backward(
        self,
        sequences: Sequence[Sequence[int]],
        coefficients: Sequence[PerToken],
        *,
        routes: Sequence[Routes] | None = None,
    ) -> None:
        """Add the sum of coefficient × gradient of log-probability to the gradient."""
        asked = self._checked(sequences, routes)
        kept, self._kept = self._kept, None
        shapes = [np.shape(each) for each in coefficients]
        if shapes != [(len(one) - 1,) for one in asked]:
            raise ValueError(f"coefficients: found shapes {shapes}, expected one per prediction")
        if not all(np.isfinite(each).all() for each in coefficients):
            raise ValueError("coefficients: found one that is not finite: the loss must be mended")
        if kept and kept[0] == asked and _are_same(kept[1], routes):
            found = kept[2]
        else:
            found = self._forward(asked, routes)
        logprobs = torch.cat(found)
        own = coefficients[self._rank :: self._count] or [np.zeros(1)]
        weights = torch.from_numpy(np.concatenate(own)).to(logprobs)
        # Processes average their gradients; this is to be a sum.
        (logprobs * weights).sum().mul(self._count).backward()

    def step(self, adam: AdamSettings, *, learning_rate: float, divisor: float) -> OptimizerFigures:
        """Divide, clip, update by AdamW, and clear."""
        self._kept = None
        for each in self._masters.values():
            if each.grad is None:  # an expert that no token went to
                each.grad = torch.zeros_like(each)
        gradients = [each.grad for each in self._masters.values()]
        norm = float(_whole(torch.nn.utils.get_total_norm(gradients))) / divisor
        if not np.isfinite(norm):
            self._clear()
            raise TrainerError(self._base.name, "its gradient is not finite; nothing was changed")
        scale = min(1.0, adam.grad_clip_norm / (norm + 1e-6)) if adam.grad_clip_norm else 1.0
        torch._foreach_mul_(gradients, scale / divisor)
        for group, decay in zip(
            self._optimizer.param_groups, (adam.weight_decay, 0.0), strict=True
        ):
            group.update(lr=learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps)
            group["weight_decay"] = decay
        self._optimizer.step()
        self._clear()
        return OptimizerFigures(gradient_norm=norm)

    def save_state(self, name: str) -> StateRef:
        """Write masters and moments durably."""
        arrays: dict[str, Any] = {}
        for key, each in self._parts().items():
            full = _whole(each.detach())  # all processes take part
            if self._rank == 0:
                arrays[key] = full.cpu().numpy()
        facts = {"trainer": "torch", "step": self._steps()}
        return self._first(lambda: write_state(self._states, name, arrays, facts))

    def load_state(self, ref: StateRef) -> None:
        """Become what was saved."""
        arrays, facts = read_state(self._states, ref)
        own = self._parts()
        found = {name: each.shape for name, each in arrays.items()}
        if facts.get("trainer") != "torch" or found != {n: each.shape for n, each in own.items()}:
            raise StoreError(ref.path, "a state of another trainer or model")
        with torch.no_grad():
            for name, each in own.items():
                each.copy_(_like(torch.from_numpy(arrays[name]), each))
        for state in self._optimizer.state.values():
            state["step"].fill_(float(facts["step"]))
        self._clear()

    def remove_state(self, ref: StateRef) -> None:
        """Remove what was saved."""
        self._first(lambda: remove_state(self._states, ref))

    def export(self, directory: Path) -> None:
        """Write a checkpoint as transformers does, with the base model's other files."""
        dtype = getattr(torch, self._export_dtype)
        # Tied parameters stay one, so that they are written once.
        named = self._model.named_parameters(remove_duplicate=False)
        own = {name: id(each) for name, each in named}
        rounded: dict[Any, Any] = {}
        state: dict[str, Any] = {}
        for name, each in self._model.state_dict().items():
            key = own.get(name, name)
            if key not in rounded:
                full = _whole(each)
                rounded[key] = full.to(dtype) if self._rank == 0 else None
            state[name] = rounded[key]
        self._first(lambda: self._write(directory, state))

    def _write(self, directory: Path, state: dict[str, Any]) -> None:
        for name, each in state.items():
            if not bool(torch.isfinite(each).all()):
                reason = f"{name} has a weight that is no number, or beyond {self._export_dtype}"
                raise TrainerError(self._base.name, reason)
        view = view_checkpoint(self._base)
        with new_directory(directory) as out:
            written = out / "written"
            self._model.save_pretrained(written, state_dict=state)
            for path in sorted(written.iterdir()):
                if path.suffix == ".safetensors" or path.name == INDEX_FILE:
                    sync_and_replace(path, out / path.name)
            remove_tree(written)
            for each in view.checkpoint.side_files:
                if each.file == CONFIG_FILE:
                    config = json.loads(read_whole(view.file(CONFIG_FILE)))
                    keys = {"dtype", "torch_dtype"} & config.keys()
                    config |= dict.fromkeys(keys, self._export_dtype)
                    write_atomic(out / CONFIG_FILE, json.dumps(config, indent=2).encode())
                elif each.file not in (INDEX_FILE, SPEC_FILE):
                    copy_file(view.file(each.file), out / each.file)

    def _first(self, act: Callable[[], Given]) -> Given:
        """Act in the first process alone; all get what it gave, or its error."""
        if self._count == 1:
            return act()
        answer: list[Any] = [None, None]
        if self._rank == 0:
            try:
                answer[0] = act()
            except Exception as error:  # noqa: BLE001 - all processes raise it
                answer[1] = error
        processes.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _forward(self, asked: Ids, routes: Sequence[Routes] | None) -> list[Any]:
        """Log-probabilities of this process's sequences."""
        if routes is not None:
            routes = routes[self._rank :: self._count]
        asked = asked[self._rank :: self._count] or NO_SEQUENCE
        device = self._model.device
        longest = max(map(len, asked)) - 1
        ids = torch.zeros((len(asked), longest), dtype=torch.long)
        mask, targets = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, one in enumerate(asked):
            count = len(one) - 1
            ids[row, :count], targets[row, :count] = torch.tensor(one[:-1]), torch.tensor(one[1:])
            mask[row, :count] = 1
        if self._replay is not None:
            self._replay.follow(routes, longest, device)
        is_whole = bool(mask.all())
        with torch.autocast(device.type, torch.bfloat16, enabled=self._compute_dtype != "float32"):
            output = self._model(
                ids.to(device),
                attention_mask=None if is_whole else mask.to(device),
                use_cache=False,
            )
        logits = output.logits.float() / self._temperature
        chosen = logits.gather(-1, targets.to(device)[:, :, None])[:, :, 0]
        logprobs = chosen - logits.logsumexp(-1)
        return [row[: len(one) - 1] for row, one in zip(logprobs, asked, strict=True)]

    def _parts(self) -> dict[str, Any]:
        parts = {f"weight/{name}": each for name, each in self._masters.items()}
        for key, own in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            for name, each in self._masters.items():
                parts[f"{key}/{name}"] = self._optimizer.state[each][own]
        return parts

    def _steps(self) -> int:
        return int(next(iter(self._optimizer.state.values()))["step"])

    def _clear(self) -> None:
        self._kept = None
        self._optimizer.zero_grad(set_to_none=True)

    def _checked(self, sequences: Sequence[Sequence[int]], routes: Sequence[Routes] | None) -> Ids:
        config = self._model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        for number, one in enumerate(sequences):
            if len(one) < 2 or (limit and len(one) > limit + 1):
                expected = f"2 to {limit + 1}" if limit else "2 or more"
                raise ValueError(f"sequence {number}: found {len(one)} tokens, expected {expected}")
            if not 0 <= min(one) <= max(one) < config.vocab_size:
                raise ValueError(f"sequence {number}: expected ids below {config.vocab_size}")
        if routes is not None:
            if self._replay is None:
                raise ValueError("routes: this trainer was opened without router_replay")
            self._replay.check(routes, sequences)
        return tuple(tuple(map(int, one)) for one in sequences)


def _are_same(kept: Sequence[Routes] | None, given: Sequence[Routes] | None) -> bool:
    if kept is None or given is None:
        return kept is given
    return all(np.array_equal(one, other) for one, other in zip(kept, given, strict=True))


def _whole(tensor: Any) -> Any:
    """All of a tensor that processes may hold in parts; all of them call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(whole: Any, tensor: Any) -> Any:
    """A whole tensor as this process holds it of `tensor`."""
    if not hasattr(tensor, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = tensor.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, tensor.placements)
