"""Mixtures of experts: the emulator's forward against transformers, and the torch trainer along the
routes that it told; `make test-train`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from factories import scored_group, trajectory

from emulator.engine import decoding
from emulator.engine.engine import SamplingParameters
from emulator.engine.llama import LlamaWeights
from emulator.engine.numpy_engine import NumpyEngine
from hotload.dataset.table import rollouts_frame
from hotload.dataset.trainer_batch import make_batch
from hotload.directory.relayout import view_checkpoint
from hotload.errors import TrainerError
from hotload.rollout.routing import ITEM, Routes, routes_of_matrices
from hotload.rollout.trajectory import ScoredGroup, Segment
from hotload.trainers.saved_state import read_state
from hotload.trainers.step_samples import StepSamples
from hotload.trainers.torch_trainer import TorchTrainer, open_torch_trainer
from hotload.trainers.training_step import StepSettings, train_step
from hotload.training.policy_loss import PolicyLoss
from hotload.training.schedule import AdamSettings

FIXTURES = Path(__file__).parents[1] / "emulator" / "fixtures"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def model_of(directory: Path, *, seed: int = 0, router: float = 1.0, **changes: Any) -> Path:
    """A random model in float32. The rows of a router are moved towards its first one: near 0 all
    experts are tied, and rounding decides."""
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(**SHAPE | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                each.copy_(each[:1] + router * (each - each[:1]))
    model.save_pretrained(directory)
    return directory


def opened(base: Path, states: Path, **arguments: Any) -> TorchTrainer:
    return open_torch_trainer(str(base), str(states), **arguments)


def sequences(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 64, length).tolist() for length in (9, 4, 2, 13, 6)]


def coefficients(asked: Sequence[Sequence[int]]) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.standard_normal(len(one) - 1) for one in asked]


def computed(weights: LlamaWeights, ids: Sequence[int]) -> tuple[np.ndarray, Routes]:
    """What the emulator serves: log-probabilities of each token but the first, and all routes."""
    cache = weights.empty_cache()
    logits = weights.forward(ids[:-1], cache, all_positions=True)
    table = np.array([decoding.log_softmax(row.astype(np.float64)) for row in logits])
    experts = cache.experts[: cache.length].reshape(cache.length, -1).astype(ITEM)
    return table[np.arange(len(ids) - 1), ids[1:]], experts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"decoder_sparse_step": 2, "num_hidden_layers": 4},
        {"mlp_only_layers": [0, 2]},
        {"num_experts_per_tok": 1, "tie_word_embeddings": True},
        {"num_experts_per_tok": 16, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_the_numpy_forward_is_that_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    base = model_of(tmp_path / "base", **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True
    )
    weights = NumpyEngine().load(base)
    for ids in sequences():
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_router_logits=True)
        cache = weights.empty_cache()
        logits = weights.forward(ids, cache, all_positions=True)
        assert np.abs(logits - output.logits[0].numpy()).max() < 1e-4
        count = model.config.num_experts_per_tok
        chosen = [each.topk(count, dim=-1).indices for each in output.router_logits]
        expected = torch.stack(chosen, dim=1).numpy()
        found = cache.experts[: len(ids)]
        assert found.shape == expected.shape
        assert (np.sort(found) == np.sort(expected)).all()


def test_what_is_exported_is_served_alike(tmp_path: Path) -> None:
    asked = sequences()
    trainer = opened(model_of(tmp_path / "base", mlp_only_layers=[1]), tmp_path)
    trainer.backward(asked, coefficients(asked))
    trainer.step(AdamSettings(), learning_rate=1e-2, divisor=len(asked))
    trainer.export(tmp_path / "out")
    view = view_checkpoint(tmp_path / "out")
    assert view.check_heads() == ()
    weights = NumpyEngine().load(tmp_path / "out")
    same = opened(tmp_path / "out", tmp_path).logprobs(asked)
    for ids, ours in zip(asked, same, strict=True):
        assert np.abs(ours - computed(weights, ids)[0]).max() < 2e-5


def test_replayed_routes_are_of_the_tokens_that_they_stand_beside(tmp_path: Path) -> None:
    """With one expert a token its weight is 1 whatever the router says: along the routes of
    another router the model is that other one, where each token has its own."""
    only_one = {"num_experts_per_tok": 1}
    base = model_of(tmp_path / "base", **only_one)
    weights = NumpyEngine().load(base)
    trainer = opened(base, tmp_path, router_replay=True)
    with torch.no_grad():
        for name, each in trainer._masters.items():
            if name.endswith("mlp.gate.weight"):
                each.neg_()
    asked = sequences()
    expected, routes = zip(*(computed(weights, ids) for ids in asked), strict=True)
    along = np.concatenate(trainer.logprobs(asked, routes=routes))
    assert np.abs(along - np.concatenate(expected)).max() < 2e-5
    own = np.concatenate(trainer.logprobs(asked))
    assert np.abs(own - np.concatenate(expected)).max() > 0.1
    # Beside the tokens before them they lead elsewhere, and where there is none the router chooses.
    shifted = [np.roll(one, 1, axis=0) for one in routes]
    astray = np.concatenate(trainer.logprobs(asked, routes=shifted))
    assert np.abs(astray - np.concatenate(expected)).max() > 0.1
    untold = [np.full_like(one, -1) for one in routes]
    assert np.array_equal(np.concatenate(trainer.logprobs(asked, routes=untold)), own)


def foreign(asked: Sequence[Sequence[int]]) -> list[Routes]:
    """Routes that no router here would choose: 3 layers, 2 of 16 experts; some tokens have none."""
    random = np.random.default_rng(4)
    found = []
    for ids in asked:
        chosen = [random.permutation(16)[:2] for _ in range(3 * (len(ids) - 1))]
        routes = np.concatenate(chosen).reshape(len(ids) - 1, 6).astype(ITEM)
        routes[::3] = -1
        found.append(routes)
    return found


def gradients(trainer: TorchTrainer, states: Path) -> dict[str, np.ndarray]:
    """A tenth of the gradient."""
    trainer.step(AdamSettings(), learning_rate=0.0, divisor=1.0)
    arrays, _ = read_state(states, trainer.save_state("moments"))
    return {name: each for name, each in arrays.items() if name.startswith("first/")}


def test_a_gradient_along_routes_is_the_same_kept_computed_again_or_twice(tmp_path: Path) -> None:
    base, asked = model_of(tmp_path / "base"), sequences()
    routes, values = foreign(asked), coefficients(asked)
    plain = opened(base, tmp_path)
    plain.backward(asked, values)
    ways = {}
    for way in ("kept", "again", "in parts", "twice"):
        trainer = opened(base, tmp_path, router_replay=True, gradient_checkpointing=way == "twice")
        if way in ("kept", "twice"):
            trainer.logprobs(asked, is_before_backward=True, routes=routes)
        if way == "in parts":
            trainer.backward(asked[:2], values[:2], routes=routes[:2])
            trainer.backward(asked[2:], values[2:], routes=routes[2:])
        else:
            trainer.backward(asked, values, routes=routes)
        ways[way] = gradients(trainer, tmp_path)
    for way, found in ways.items():
        for name, each in found.items():
            apart = np.abs(each - ways["kept"][name]).max()
            assert apart <= 1e-5 * np.abs(each).max(), (way, name)
    routers = [name for name in ways["kept"] if name.endswith("mlp.gate.weight")]
    assert len(routers) == 3
    own = gradients(plain, tmp_path)
    for name in routers:  # what the chosen experts weigh is the router's, and learns
        assert np.abs(ways["kept"][name]).max() > 0
        assert np.abs(ways["kept"][name] - own[name]).max() > 0.1 * np.abs(own[name]).max()


def test_kept_activations_of_other_routes_are_not_used(tmp_path: Path) -> None:
    base, asked = model_of(tmp_path / "base"), sequences()
    routes, values = foreign(asked), coefficients(asked)
    found = []
    for before in (routes, None, [np.flip(one, axis=0) for one in routes]):
        trainer = opened(base, tmp_path, router_replay=True)
        trainer.logprobs(asked, is_before_backward=True, routes=before)
        trainer.backward(asked, values, routes=routes)
        found.append(gradients(trainer, tmp_path))
    for other in found[1:]:
        for name, each in other.items():
            assert np.allclose(each, found[0][name], atol=1e-6 * np.abs(each).max()), name


def test_routes_of_another_model_are_refused(tmp_path: Path) -> None:
    base, asked = model_of(tmp_path / "base"), sequences()
    trainer, routes = opened(base, tmp_path, router_replay=True), foreign(asked)
    beyond = [one.copy() for one in routes]
    beyond[3][1, 2] = 16
    for wrong, why in (
        (routes[:4], "routes of 4 sequences, expected 5"),
        ([one[:, :4] for one in routes], r"sequence 0: found routes \[8, 4\].*expected \[8, 6\]"),
        ([one[1:] for one in routes], r"sequence 0: found routes \[7, 6\]"),
        (beyond, "sequence 3: .*the highest expert 16; expected .* choose 2 of 16 experts"),
    ):
        with pytest.raises(ValueError, match=why):
            trainer.logprobs(asked, routes=wrong)
        with pytest.raises(ValueError, match=why):
            trainer.backward(asked, coefficients(asked), routes=wrong)
    with pytest.raises(ValueError, match="opened without router_replay"):
        opened(base, tmp_path).logprobs(asked, routes=routes)
    with pytest.raises(TrainerError, match="no layer has experts to choose"):
        opened(FIXTURES / "llama", tmp_path, router_replay=True)
    assert trainer.replays_routes
    assert trainer.describe().details["router_replay"] is True


def test_other_families_with_a_router_of_their_own(tmp_path: Path) -> None:
    """Their routers choose by one topk, too: with all experts' scores equal the routes decide."""
    common = {name: SHAPE[name] for name in (*list(SHAPE)[:8], "num_experts_per_tok")}
    for config in (
        transformers.MixtralConfig(**common, num_local_experts=16),
        transformers.OlmoeConfig(**common, num_experts=16),
    ):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        base = tmp_path / config.model_type
        model.save_pretrained(base)
        trainer, asked = opened(base, tmp_path, router_replay=True), sequences()
        along = trainer.logprobs(asked, routes=foreign(asked))
        own = trainer.logprobs(asked)
        assert np.abs(np.concatenate(along) - np.concatenate(own)).max() > 1e-4, base


# The divergence: a service that rounds, and a router that can hardly decide.


def sampled(weights: LlamaWeights, prompt: Sequence[int], seed: int, count: int) -> Segment:
    """An answer of the emulator's engine, with the routes of what it sampled."""
    made = decoding.prefill(weights, prompt, SamplingParameters(seed=seed), None, echo=False)
    tokens = made.begin(0, frozenset()).advance(weights, count)
    return Segment(
        tuple(prompt),
        tuple(token.id for token in tokens),
        tuple(token.sampling_logprob or 0.0 for token in tokens),
        (True,) * count,
        routes_of_matrices([token.routing or "" for token in tokens], len(prompt)),
    )


def rollout(weights: LlamaWeights, groups: int, size: int, count: int) -> list[ScoredGroup]:
    random = np.random.default_rng(0)
    made = []
    for group in range(groups):
        prompt = random.integers(0, 64, 8).tolist()
        samples = [
            trajectory(
                sampled(weights, prompt, group * size + number, count),
                number=number,
                problem_id=f"p{group}",
            )
            for number in range(size)
        ]
        made.append(scored_group(*samples))
    return made


def k3(trainer: TorchTrainer, groups: Sequence[ScoredGroup]) -> float:
    """As a step tells it."""
    frame = rollouts_frame(groups, run_id="run", policy_version=0)
    samples = StepSamples.of_batch(make_batch(frame))
    loss, settings = PolicyLoss(kl_beta=0), StepSettings()
    outcome = train_step(trainer, samples, loss, settings, learning_rate=0.0)
    return outcome.figures["train/inference_k3"]


def with_whole_routes(weights: LlamaWeights, groups: list[ScoredGroup]) -> list[ScoredGroup]:
    """The same samples, their prompts' routes told, too."""

    def whole(one: Segment) -> Segment:
        routes = computed(weights, (*one.prompt_token_ids, *one.token_ids_T))[1]
        return replace(one, routes=routes.tobytes())

    return [
        replace(
            group,
            trajectories_G=tuple(
                replace(sample, segments=tuple(map(whole, sample.segments)))
                for sample in group.trajectories_G
            ),
        )
        for group in groups
    ]


@pytest.mark.parametrize("router", [0.1, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replay_lowers_the_divergence(
    seed: int, router: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_of(tmp_path / "base", seed=seed, router=router)
    replaying, choosing = (opened(base, tmp_path, router_replay=on) for on in (True, False))
    choosing.export(tmp_path / "served")  # bf16
    weights, exact = NumpyEngine().load(tmp_path / "served"), NumpyEngine().load(base)
    groups = rollout(weights, groups=8, size=8, count=24)
    off, on = k3(choosing, groups), k3(replaying, groups)
    whole = k3(replaying, with_whole_routes(weights, groups))
    apart = []
    for group in groups:
        for sample in group.trajectories_G:
            (one,) = sample.segments
            ids = (*one.prompt_token_ids, *one.token_ids_T)
            ours, theirs = (
                np.sort(computed(each, ids)[1].reshape(-1, 3, 2)) for each in (exact, weights)
            )
            apart.append((ours != theirs).any(axis=(1, 2)).mean())
    figures = {"off": off, "on": on, "whole": whole, "tokens led elsewhere": np.mean(apart)}
    with capsys.disabled():
        told = ", ".join(f"{name} {each:.2g}" for name, each in figures.items())
        print(f"\nrouter × {router}, seed {seed}: k3 {told}")
    assert on < off / 4
    assert whole < off / 50
