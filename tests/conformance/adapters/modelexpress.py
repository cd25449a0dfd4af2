"""`modelexpress` 0.7.0, the object-storage receiver of its RL part: runs in `.oracle-venv`.

Its checkpoint store is driven as the receiver drives it, with a folder in the place of the bucket.
The classes are private there; the version is pinned.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from modelexpress_rl import ObjectStorageGeneratorConfig, ObjectStorageType, WeightPayloadFormat
from modelexpress_rl.inference.receiver import _LocalCheckpoint, _S3Version

READS = ("coreweave/adler32",)
DEVIATIONS = {
    "robustness/overlapping-offsets": "looks only at the header entries that the index names",
    "robustness/offsets-beyond-the-file": "takes what there is of such a payload",
}
INDEX = "model.safetensors.index.json"


class Bucket:
    """What the receiver asks of its S3 client, over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, uri: str) -> bytes:
        return (self.folder / uri.rpartition("/")[2]).read_bytes()


def apply(base: Path, delta: Path, out: Path) -> None:
    metadata = json.loads((delta / INDEX).read_bytes())["metadata"]
    cache = out.with_name(f".{out.name}.cache")
    config = ObjectStorageGeneratorConfig(
        storage_type=ObjectStorageType.S3,
        initial_base_version_id=metadata["base_version"],
        seed_checkpoint_path=base,
        refit_checkpoint_dir=cache,
    )
    version = _S3Version(
        metadata["version"],
        metadata["base_version"],
        WeightPayloadFormat.XOR_DELTA,
        f"s3://bucket/{INDEX}",
    )
    try:
        checkpoint = _LocalCheckpoint(model_name="model", config=config, s3=Bucket(delta))
        checkpoint.initialize()
        checkpoint.prepare(version).path.rename(out)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
