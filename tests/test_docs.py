"""Documents that must not drift from the code."""

from pathlib import Path

from hotload.publish.chain import TRANSITIONS

ROOT = Path(__file__).resolve().parents[1]


def test_the_picture_of_the_chain_is_drawn_from_the_table() -> None:
    drawn = "\n".join(
        f"    {before.value} --> {after.value}: {event.value}"
        for (before, event), after in TRANSITIONS.items()
    )
    page = (ROOT / "docs" / "chain.md").read_text()
    assert f"stateDiagram-v2\n{drawn}\n" in page, f"docs/chain.md should show:\n{drawn}"
