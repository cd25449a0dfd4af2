"""Envelopes: how a checksum is written, and nothing else passes for it."""

import pytest

from hotload.delta.checksums import Checksum
from hotload.delta.envelope import ARC_V2, Envelope


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        ("478807142", 478807142),
        ("4294967295", 4294967295),
        ("4294967296", None),
        ("01", None),
        ("+1", None),
        ("-1", None),
        (" 1", None),
        ("1 ", None),
        ("1_0", None),
        ("1c8a0466", None),
        ("", None),
        ("٣", None),
        ("1\n", None),
        (None, None),
        ("9" * 5000, None),
    ],
    ids=ascii,
)
def test_a_checksum_is_read_only_in_its_exact_decimal_form(
    text: str | None, value: int | None
) -> None:
    hexadecimal = None if value is None else f"{value:08x}"
    assert ARC_V2.parse(text) == hexadecimal
    if hexadecimal is not None:
        assert ARC_V2.spell(hexadecimal) == text


@pytest.mark.parametrize("checksum", Checksum)
def test_other_dialects_write_hex_of_full_width(checksum: Checksum) -> None:
    envelope = Envelope(checksum, is_decimal=False, has_every_tensor=False)
    text = "0a" * (checksum.digits // 2)
    assert envelope.parse(text) == text == envelope.spell(text)
    for other in (None, "", text[1:], text + "0", text.upper(), text[:-1] + "g", f" {text[1:]}"):
        assert envelope.parse(other) is None
