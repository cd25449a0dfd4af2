"""How families of hot-load services spell the same calls: headers, names, paths, formats.

Both take the same bytes. `fireworks` is the vendor's own API (protocol §1-§8); `plain` is a door
with nothing but signal, status and inference (protocol §22).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hotload.publish import fireworks_names

ApiDialectName = Literal["fireworks", "plain"]


@dataclass(frozen=True, slots=True)
class ApiDialect:
    """The spelling of one family.

    `names_are_resources` says whether a model is called `accounts/<a>/models/<m>` or just `<m>`,
    `formats` what a signal calls the delta's compression and checksum.
    """

    model_header: str
    deployment_header: str
    names_are_resources: bool
    inference_prefix: str
    formats: Mapping[str, str]
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
        has_control_plane=False,
    ),
}
