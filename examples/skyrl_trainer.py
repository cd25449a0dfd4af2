"""A trainer behind SkyRL's Tinker server, as a run file names it: `examples.skyrl_trainer:connect`.

Tried with skyrl 0.4.0, its engine on JAX, and tinker 0.25.0. The engine divides a row by the sum of
its weights, and a step by its rows, so a plain client is refused by the scale probe.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import httpx
import tinker

from hotload.trainers.tinker_trainer import TinkerConnection

# Clipped to 1 whatever the ratio is, this loss is −Σ advantage · log-probability, and the weights
# of a row are 1 each: what the engine divides by is then known.
AS_A_SUM = {"clip_low_threshold": 1.0, "clip_high_threshold": 1.0}
DOWNLOAD_SECONDS = 600.0


def connect(base_url: str, base_model: str, rank: int = 8, seed: int = 0) -> TinkerConnection:
    """Begin an adapter at a server.

    Args:
        base_model: as the server names it.
        seed: of the adapter's first weights.
    """
    service = tinker.ServiceClient(base_url=base_url)
    client = service.create_lora_training_client(base_model=base_model, rank=rank, seed=seed)

    def download(path: str, directory: Path) -> None:
        model, name = path.removeprefix("tinker://").split("/")
        found = service.create_rest_client().get_checkpoint_archive_url(model, name).result()
        answer = httpx.get(found.url, follow_redirects=True, timeout=DOWNLOAD_SECONDS)
        with tarfile.open(fileobj=io.BytesIO(answer.raise_for_status().content)) as archive:
            archive.extractall(directory, filter="data")

    def reopen(path: str) -> SummingClient:
        return SummingClient(service.create_training_client_from_state_with_optimizer(path))

    return TinkerConnection(SummingClient(client), tinker.types, download, reopen)


class SummingClient:
    """A training client whose gradient is the sum over the rows of a step.

    Rows are sent when the step comes, since the engine divides by how many there are.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._rows: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        """Take every other method from the client."""
        return getattr(self._client, name)

    def forward_backward(self, data: list[Any], loss_fn: str) -> None:
        """Keep rows of weighted cross-entropy until the step."""
        assert loss_fn == "cross_entropy"
        self._rows += data

    def optim_step(self, adam: Any) -> Any:
        """Send the rows, and step once their gradient is there.

        Raises:
            ValueError: the gradient is to be clipped, which the engine leaves out in silence.
        """
        if adam.grad_clip_norm:
            raise ValueError("SkyRL's JAX engine does not clip: set adam.grad_clip_norm to 0")
        rows, self._rows = self._rows, []
        made = [_as_advantages(row, len(rows)) for row in rows]
        self._client.forward_backward(made, "cispo", AS_A_SUM).result()
        return self._client.optim_step(adam)


def _as_advantages(row: Any, row_count: int) -> Any:
    """Turn the weights of a row into advantages that the engine divides back into them."""
    weights = row.loss_fn_inputs["weights"].to_numpy()
    advantages = weights * (weights.size * row_count)
    return tinker.types.Datum(
        model_input=row.model_input,
        loss_fn_inputs={
            "target_tokens": row.loss_fn_inputs["target_tokens"],
            "advantages": tinker.types.TensorData.from_numpy(advantages),
            "logprobs": tinker.types.TensorData.from_numpy(0 * weights),
        },
    )
