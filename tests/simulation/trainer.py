"""A trainer whose checkpoints are a few kilobytes: four shards, one value in 64 moves a step."""

from __future__ import annotations

import hashlib
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize

from examples.tiny_trainer import CHAT_TEMPLATE, CONFIG, VOCABULARY, make_tokenizer
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import PREFIX_BYTES
from hotload.directory.shards import read_checkpoint

HIDDEN = 8
ROWS_BY_FILE = {
    "model-00001-of-00004.safetensors": {"model.embed_tokens.weight": VOCABULARY},
    "model-00002-of-00004.safetensors": {
        "model.layers.0.mlp.down_proj.weight": 40,
        "model.layers.0.mlp.up_proj.weight": 24,
    },
    "model-00003-of-00004.safetensors": {"model.norm.weight": 1},
    "model-00004-of-00004.safetensors": {"lm_head.weight": VOCABULARY},
}


@cache
def _first_files() -> dict[str, bytes]:
    random_numbers = np.random.default_rng(1)
    files: dict[str, bytes] = {}
    for file, rows_by_name in ROWS_BY_FILE.items():
        specs, arrays = {}, []
        for name, rows in rows_by_name.items():
            bits = random_numbers.integers(0x3C00, 0x3D00, (rows, HIDDEN), dtype=np.uint16)
            arrays.append(bits)  # they stay until their bytes are taken
            specs[name] = TensorSpec(
                dtype="bfloat16",
                shape=[rows, HIDDEN],
                data_ptr=bits.ctypes.data,
                data_len=bits.nbytes,
            )
        files[file] = bytes(serialize(specs, {"format": "pt"}))
    return files


@cache
def _tokenizer() -> str:
    return make_tokenizer().to_str()


class Trainer:
    """Writes checkpoint after checkpoint, of its `line`; `digests` are those that the files of a
    line and version have had."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._seed = root, seed
        self._files = {name: bytearray(data) for name, data in _first_files().items()}
        self.digests: dict[tuple[int, int], dict[str, set[str]]] = {}
        self.line = 0
        self._first_versions = {0: 0}

    @property
    def base(self) -> Path:
        """The model that a service serves before any snapshot."""
        return self._root / "base"

    def write_base(self, *, with_tokenizer: bool) -> None:
        """Write the base model."""
        self._write(self.base)
        if with_tokenizer:
            (self.base / "tokenizer.json").write_text(_tokenizer())
            settings = {"chat_template": CHAT_TEMPLATE}
            (self.base / "tokenizer_config.json").write_text(json.dumps(settings))

    def step(self, version: int) -> Path:
        """Move one value in 64 and write the checkpoint of `version`."""
        chance = random.Random(f"{self._seed} {self.line} {version}")
        for data in self._files.values():
            start = _start_of(data)
            count = (len(data) - start) // 2
            for index in chance.sample(range(count), max(1, count // 64)):
                data[start + 2 * index] ^= chance.choice((1, 2, 3))
        directory = self.directory(self.line, version)
        self._write(directory)
        digests = {path.name: {_sha256(path)} for path in directory.iterdir()}
        self.digests[self.line, version] = digests
        return directory

    def resume(self, version: int) -> None:
        """Begin a new line with `version`, from the checkpoint before it."""
        before = (
            self.directory(self.line_at(version - 1), version - 1) if version > 1 else self.base
        )
        self._files = {name: bytearray((before / name).read_bytes()) for name in self._files}
        self.line += 1
        self._first_versions[self.line] = version
        self.step(version)

    def line_at(self, version: int) -> int:
        """Name the newest line that has come to a version."""
        return max(line for line, first in self._first_versions.items() if first <= version)

    def become_other(self) -> None:
        """Replace all weights by ones that have nothing to do with them, from the next step on."""
        chance = random.Random(f"{self._seed} {self.line} {len(self.digests)} other")
        for data in self._files.values():
            start = _start_of(data)
            bits = np.frombuffer(chance.randbytes(len(data) - start), dtype="<u2")
            data[start:] = (bits & 0xBFFF).tobytes()  # below 2, so that all are numbers

    def write_again(self, line: int, version: int) -> None:
        """Change a value of a shard that was written before, or change it back."""
        path = min(self.directory(line, version).glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
        self.digests[line, version][path.name].add(_sha256(path))

    def directory(self, line: int, version: int) -> Path:
        """Where the checkpoint of a version lies."""
        return self._root / f"step-{line}-{version:06d}"

    def _write(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        for name, data in self._files.items():
            (directory / name).write_bytes(data)
        for name, content in _side_files(directory).items():
            (directory / name).write_bytes(content)


# All checkpoints have the same tensors, so what is said of the first holds for every other.
_SIDE_FILES: dict[str, bytes] = {}


def _side_files(directory: Path) -> dict[str, bytes]:
    if not _SIDE_FILES:
        shards = read_checkpoint(directory).shards
        config = {**CONFIG, "hidden_size": HIDDEN, "num_hidden_layers": 1}
        _SIDE_FILES[INDEX_FILE] = build_index(shards)
        _SIDE_FILES[SPEC_FILE] = build_spec(shards)
        _SIDE_FILES[CONFIG_FILE] = json.dumps(config).encode()
    return _SIDE_FILES


def _start_of(data: bytearray) -> int:
    return PREFIX_BYTES + int.from_bytes(data[:PREFIX_BYTES], "little")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
