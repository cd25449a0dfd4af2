"""What each process of `torchrun` does in the test of shares: steps, a state, exports."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch.distributed as processes

from hotload.errors import TrainerError
from hotload.rollout.routing import Routes
from hotload.trainers.torch_trainer import TorchTrainer, open_torch_trainer
from hotload.training.schedule import AdamSettings

ADAM = AdamSettings(grad_clip_norm=1.0)


def sequences(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    lengths = (9,) if seed == 1 else (9, 4, 2, 13, 6)  # one process may have none
    return [random.integers(0, 64, length).tolist() for length in lengths]


def routes(asked: list[list[int]]) -> list[Routes]:
    """Two of eight experts in two layers, for every token but the last."""
    random = np.random.default_rng(len(asked))
    return [
        np.argsort(random.random((len(one) - 1, 2, 8)))[:, :, :2]
        .reshape(len(one) - 1, 4)
        .astype(np.int16)
        for one in asked
    ]


def trained(trainer: TorchTrainer, steps: Iterable[int]) -> list[float | None]:
    """The norms of the gradients, along routes where they are replayed."""
    norms = []
    for step in steps:
        asked = sequences(step)
        along = routes(asked) if trainer.replays_routes else None
        logprobs = trainer.logprobs(asked, is_before_backward=True, routes=along)
        trainer.backward(asked, [1 / (1 - each) for each in logprobs], routes=along)
        norms.append(trainer.step(ADAM, learning_rate=1e-3, divisor=2.0).gradient_norm)
    return norms


def main(base: str, out: Path) -> None:
    has_experts = base.endswith("_moe")
    trainer = open_torch_trainer(base, str(out / "states"), device="cpu", router_replay=has_experts)
    norms = trained(trainer, range(2))
    ref = trainer.save_state("two")
    norms += trained(trainer, range(2, 4))
    trainer.export(out / "straight")
    trainer.load_state(ref)
    trained(trainer, range(2, 4))
    trainer.export(out / "resumed")
    trainer.backward(sequences(0), [np.full(len(one) - 1, 1e38) for one in sequences(0)])
    refused = ""
    try:
        trainer.step(ADAM, learning_rate=1e-3, divisor=1e-30)
    except TrainerError as error:
        refused = str(error)
    found = {
        "norms": norms,
        "ref": ref.model_dump(),
        "logprobs": [each.tolist() for each in trainer.logprobs(sequences(0))],
        "parameter_count": trainer.describe().parameter_count,
        "refused": refused,
        "held": sum(each.to_local().numel() for each in trainer._masters.values()),
    }
    (out / f"process-{processes.get_rank()}.json").write_text(json.dumps(found))
    processes.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
