"""Routers of transformers' models that choose the experts they are told: router replay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from hotload.checkpoint.sub_configs import expert_counts
from hotload.errors import TrainerError
from hotload.rollout.routing import NO_ROUTE, Routes


class RouterReplay:
    """Takes the choice of every layer with experts; what the chosen ones weigh, and the gradient of
    that, stay the router's.

    A router is what takes the `num_experts_per_tok` best of all experts' scores by `torch.topk`
    within a module that has `experts`.

    Raises:
        TrainerError: the model has no layer with experts.
    """

    def __init__(self, model: Any, name: str) -> None:
        config = model.config.get_text_config()
        self._name = name
        self._routes: Any = None
        self._expert_count = max(expert_counts(config.to_dict()), default=0)
        self._active_count = int(getattr(config, "num_experts_per_tok", 0) or 0)
        layers = [each for each in model.modules() if hasattr(each, "experts")]
        self._layer_count = len(layers)
        if not (layers and self._expert_count and self._active_count):
            raise TrainerError(name, "router_replay: no layer has experts to choose")
        for number, layer in enumerate(layers):
            layer.forward = partial(self._run, layer.forward, number)

    def check(self, routes: Sequence[Routes], sequences: Sequence[Sequence[int]]) -> None:
        """See that there are routes of this model for every sequence.

        Raises:
            ValueError: a sequence has others, or there is another number of them.
        """
        if len(routes) != len(sequences):
            raise ValueError(f"routes of {len(routes)} sequences, expected {len(sequences)}")
        width = self._layer_count * self._active_count
        for number, (one, ids) in enumerate(zip(routes, sequences, strict=True)):
            if one.shape != (len(ids) - 1, width) or one.max(initial=0) >= self._expert_count:
                found = f"routes {list(one.shape)}, the highest expert {one.max(initial=-1)}"
                raise ValueError(
                    f"sequence {number}: found {found}; expected [{len(ids) - 1}, {width}], for "
                    f"{self._layer_count} layers that choose {self._active_count} of "
                    f"{self._expert_count} experts"
                )

    def follow(self, routes: Sequence[Routes] | None, length: int, device: Any) -> None:
        """Choose these experts from now on, in sequences padded to `length` on the right; `None`
        lets the routers choose. A forward that the backward computes again chooses alike.
        """
        if routes is None:
            self._routes = None
            return
        padded = np.full((max(1, len(routes)), length, *self._form), NO_ROUTE, np.int64)
        for row, one in zip(padded, routes, strict=False):
            row[: len(one)] = one.reshape(-1, *self._form)
        self._routes = torch.from_numpy(padded).to(device)

    @property
    def _form(self) -> tuple[int, int]:
        return self._layer_count, self._active_count

    def _run(self, forward: Any, number: int, *arguments: Any, **named: Any) -> Any:
        if self._routes is None:
            return forward(*arguments, **named)
        chosen = self._routes[:, :, number].reshape(-1, self._active_count)
        with _ChosenExperts(chosen, self._expert_count) as router:
            output = forward(*arguments, **named)
        if router.choices != 1:
            found = f"a layer with experts chose {router.choices} times, expected once"
            raise TrainerError(self._name, f"router_replay does not fit this model: {found}")
        return output


class _ChosenExperts(TorchFunctionMode):
    """Answers the router's `topk` with the experts of each token, and their own scores."""

    def __init__(self, chosen: Any, expert_count: int) -> None:
        self._chosen, self._expert_count = chosen, expert_count
        self.choices = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0] if args else kwargs["input"]
        own, chosen = result.indices, self._chosen
        if scores.shape[-1] != self._expert_count or own.shape[-1] != chosen.shape[-1]:
            return result
        self.choices += 1
        experts = torch.where(chosen < 0, own.reshape(chosen.shape), chosen).reshape(own.shape)
        return torch.return_types.topk((scores.gather(-1, experts), experts))
