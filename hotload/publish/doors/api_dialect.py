"""How families of hot-load services spell the same calls: where, by which names and formats.

`fireworks` is the vendor's own API (protocol §1-§8); `plain` is a door with nothing but signal,
status and inference (protocol §22), which takes the same bytes; `coreweave` has calls of its own
(protocol §23, `doors.coreweave`) and deltas of changed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hotload.publish import fireworks_names

ApiDialectName = Literal["fireworks", "plain", "coreweave"]
DeltaCodec = Literal["arc_v2", "coreweave"]
"""Which deltas a service takes: with every tensor, or those that changed and an index of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDialect:
    """The spelling of one family.

    `base_url` is taken where none is declared, unless the environment has one in
    `base_url_variable`; `key_variable` holds the key there. Headers that are "" are not sent.
    `names_are_resources` says whether a model is called `accounts/<a>/models/<m>` or just `<m>`,
    `formats` what a signal calls the delta's compression and checksum, `codec` which deltas are
    taken, `prompt_cache_policies` whose prompts can be said to be recomputed, `has_control_plane`
    whether the vendor's description and ledger stand behind it, its hints and its validation.
    """

    base_url: str = fireworks_names.BASE_URL
    base_url_variable: str | None = fireworks_names.BASE_URL_VARIABLE
    key_variable: str = fireworks_names.API_KEY_VARIABLE
    model_header: str
    deployment_header: str
    names_are_resources: bool
    inference_prefix: str
    formats: Mapping[str, str]
    codec: DeltaCodec = "arc_v2"
    prompt_cache_policies: tuple[str, ...] = ("all", "none", "new_session")
    has_control_plane: bool


API_DIALECTS: Mapping[ApiDialectName, ApiDialect] = {
    "fireworks": ApiDialect(
        model_header=fireworks_names.MODEL_HEADER,
        deployment_header=fireworks_names.DEPLOYMENT_HEADER,
        names_are_resources=True,
        inference_prefix=fireworks_names.INFERENCE_PREFIX,
        formats=fireworks_names.FORMATS,
        has_control_plane=True,
    ),
    "plain": ApiDialect(
        model_header="provider-model",
        deployment_header="provider-deployment",
        names_are_resources=False,
        inference_prefix="",
        formats={"compression_format": "zstd", "checksum_format": "adler32"},
        prompt_cache_policies=("all", "new_session"),
        has_control_plane=False,
    ),
    "coreweave": ApiDialect(
        base_url="https://api.coreweave.com",
        base_url_variable=None,
        key_variable="COREWEAVE_API_TOKEN",
        model_header="",
        deployment_header="",
        names_are_resources=False,
        inference_prefix="",
        formats={
            "compressionFormat": "COMPRESSION_FORMAT_ZSTD",
            "checksumFormat": "CHECKSUM_FORMAT_ADLER32",
        },
        codec="coreweave",
        prompt_cache_policies=("all", "none"),
        has_control_plane=False,
    ),
}
