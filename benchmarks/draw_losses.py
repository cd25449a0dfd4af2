"""Draw what each policy loss does with a token: `python -m benchmarks.draw_losses`

One SVG a loss in docs/pictures/: the push on a token's log-probability, −c, by the ratio of policy
to anchor, computed by the losses themselves.
"""

import math
from pathlib import Path

import numpy as np

from hotload.training.loss_inputs import LossInputs
from hotload.training.policy_loss import PARAMETERS, PolicyLoss

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
LOWEST, HIGHEST = 0.5, 1.6
POINTS = 221
LIMIT = 1.75
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 46, 96, 30, 36
SERIES = ((1.0, "#1f6f78", "A = +1"), (-1.0, "#b4532a", "A = −1"))


def main() -> None:
    """Write a picture of every loss."""
    PICTURES.mkdir(exist_ok=True)
    for name in PARAMETERS:
        (PICTURES / f"{name}.svg").write_text(draw(name))


def draw(name: str) -> str:
    """Draw one loss with its defaults, no KL and no correction, as the text of an SVG file."""
    x = {ratio: _x(ratio) for ratio in (0.6, 0.8, 1.0, 1.2, 1.4)}
    right = WIDTH - RIGHT
    body = [
        f'<text x="{LEFT}" y="16" class="name">push on the log-probability, −c</text>',
        *(
            f'<line x1="{LEFT}" y1="{_y(push)}" x2="{right}" y2="{_y(push)}" class="grid"/>'
            f'<text x="{LEFT - 8}" y="{_y(push) + 4}" text-anchor="end">{_signed(push)}</text>'
            for push in (1.0, 0.0, -1.0)
        ),
        *(
            f'<text x="{place}" y="{HEIGHT - 20}" text-anchor="middle">{ratio:g}</text>'
            for ratio, place in x.items()
        ),
        f'<line x1="{x[1.0]}" y1="{TOP}" x2="{x[1.0]}" y2="{HEIGHT - BOTTOM}" class="grid"/>',
        f'<text x="{(LEFT + right) / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"ratio r of policy to {'sampler' if name == 'reinforce' else 'anchor'}</text>",
    ]
    for advantage, colour, label in SERIES:
        ratios, pushes = pushes_of(name, advantage)
        path = "M" + "L".join(
            f"{_x(ratio)} {_y(push)}" for ratio, push in zip(ratios, pushes, strict=True)
        )
        body.append(f'<path d="{path}" stroke="{colour}"/>')
        body.append(
            f'<text x="{right + 8}" y="{_y(pushes[-1]) + 4}" fill="{colour}">{label}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{name}">'
        "<style>text{font:12px sans-serif}"
        ".name{font-size:13px}.grid{stroke:#cfccc4}path{fill:none;stroke-width:2}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fcfbf8"/>'
        f"{''.join(body)}</svg>\n"
    )


def pushes_of(name: str, advantage: float) -> tuple[list[float], list[float]]:
    """Ratios, and −c of samples of one token at each."""
    ratios = np.linspace(LOWEST, HIGHEST, POINTS)
    anchor_T = np.full(POINTS, -2.0)
    inputs = LossInputs.of(
        lengths=np.ones(POINTS, np.int64),
        loss_mask_T=np.ones(POINTS, np.bool_),
        advantages=np.full(POINTS, advantage),
        sampling_logprobs_T=anchor_T,
        anchor_logprobs_T=anchor_T,
    )
    loss = PolicyLoss(policy_loss=name, kl_beta=0, tis=None)  # type: ignore[arg-type]
    value = loss.prepare(inputs).coefficients(anchor_T + np.log(ratios))
    return ratios.tolist(), (-value.coefficients_T).tolist()


def _x(ratio: float) -> float:
    share = math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(push: float) -> float:
    share = (LIMIT - push) / (2 * LIMIT)
    return round(TOP + share * (HEIGHT - TOP - BOTTOM), 1)


def _signed(push: float) -> str:
    return f"{push:+g}".replace("-", "−") if push else "0"


if __name__ == "__main__":
    main()
