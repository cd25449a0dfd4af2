"""Coefficients of one batch of a million tokens, each of the seven losses, on one core.

Processor time, so other load on the machine matters little; best of the repetitions. `inputs` is
the check of all arrays, `prepare` the correction; a KL adds the `kl` column.
"""

import argparse
import time

import numpy as np

from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PARAMETERS, PolicyLoss

BAR_SECONDS = 0.06


def measure(fields: dict[str, object], token_count: int, repetitions: int = 5) -> list[float]:
    """Return the best seconds of checking inputs, of preparing and of the coefficients."""
    random = np.random.default_rng(0)
    ends = np.sort(random.integers(0, token_count + 1, max(token_count // 1000, 1)))
    lengths = np.diff([0, *ends, token_count])
    anchor = -random.exponential(1.0, token_count)
    near = [np.minimum(anchor + random.normal(0, 0.2, token_count), 0) for _ in range(3)]
    loss = PolicyLoss.model_validate(fields)
    arrays = {
        "lengths": lengths,
        "loss_mask_T": random.random(token_count) < 0.8,
        "advantages": random.normal(size=lengths.size),
        "sampling_logprobs_T": near[0],
        "anchor_logprobs_T": anchor,
        "reference_logprobs_T": near[1] if loss.needs_reference else None,
    }
    found = []
    for _ in range(repetitions):
        clock = [time.process_time()]
        inputs = LossInputs.of(**arrays)
        clock.append(time.process_time())
        prepared = loss.prepare(inputs)
        clock.append(time.process_time())
        prepared.coefficients(near[2])
        clock.append(time.process_time())
        found.append(np.diff(clock).tolist())
    return [min(column) for column in zip(*found, strict=True)]


def main() -> int:
    """Print the table; return 1 where a loss misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="default: 1000000")
    options = parser.parse_args()
    print("| loss | inputs | prepare | coefficients | … with k3 | bar |")
    print("|---|---|---|---|---|---|")
    slowest = 0.0
    for name in PARAMETERS:
        plain = measure({"policy_loss": name, "kl_beta": 0}, options.tokens)
        with_kl = measure({"policy_loss": name, "kl_beta": 0.001}, options.tokens)
        slowest = max(slowest, plain[2], with_kl[2])
        shown = " | ".join(f"{1000 * seconds:.0f} ms" for seconds in [*plain, with_kl[2]])
        print(f"| {name} | {shown} | {1000 * BAR_SECONDS:.0f} ms |")
    print(f"\nslowest {1000 * slowest:.0f} ms: {'met' if slowest <= BAR_SECONDS else 'MISSED'}")
    return int(slowest > BAR_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
