"""Text to token ids and back by the base model's files; without them, ids only (protocol §11)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from agent.loading.checkpoint_files import read_json
from hotload.checkpoint.names import CONFIG_FILE

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REPLACEMENT = "�"


class UntokenizableError(ValueError):
    """Text came in without a tokenizer, or the chat template refuses the messages."""


@dataclass(frozen=True, eq=False)  # by identity: methods remember their results
class Tokens:
    """A model's tokenizer, chat template, stop ids and sampling defaults."""

    tokenizer: Tokenizer | None
    template: str
    special: Mapping[str, str]
    stop_ids: frozenset[int]
    defaults: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """From the base-model directory; every file but config.json may be missing."""
        path = directory / TOKENIZER_FILE
        tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
        settings = _optional(directory / TOKENIZER_CONFIG_FILE)
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, named
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        beside = directory / TEMPLATE_FILE
        if beside.exists():
            template = beside.read_text()
        generation = _optional(directory / GENERATION_CONFIG_FILE)
        stop = generation.get(
            "eos_token_id", read_json(directory / CONFIG_FILE).get("eos_token_id")
        )
        stop_ids = stop if isinstance(stop, list) else [stop]
        return cls(
            tokenizer=tokenizer,
            template=template if isinstance(template, str) else PLAIN_TEMPLATE,
            special={
                name: token["content"] if isinstance(token, dict) else token
                for name in ("bos_token", "eos_token", "unk_token", "pad_token")
                if (token := settings.get(name))
            },
            stop_ids=frozenset(token for token in stop_ids if isinstance(token, int)),
            defaults=generation,
        )

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Turn `text` into token ids.

        Raises:
            UntokenizableError: there is no tokenizer.
        """
        if self.tokenizer is None:
            reason = f"the model has no {TOKENIZER_FILE}: send the prompt as token ids"
            raise UntokenizableError(reason)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Turn a conversation into token ids, up to where the assistant speaks next.

        Raises:
            UntokenizableError: there is no tokenizer, or the template refuses the messages.
        """
        try:
            compiled = _environment().from_string(self.template)
            text = compiled.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self.special
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UntokenizableError(f"chat template: {error}") from None
        return self.encode(text, add_special=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn `ids` into text; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def name(self, token: int) -> tuple[str, list[int]]:
        """Give one token as text and as bytes, for log-probability lists."""
        return self._name(token)

    @lru_cache(maxsize=65536)  # noqa: B019 - lives as long as the emulator
    def _name(self, token: int) -> tuple[str, list[int]]:
        name = f"token_id:{token}"
        if self.tokenizer is not None:
            name = self.decode([token], skip_special=False)
        return name, list(name.encode())

    @lru_cache(maxsize=65536)  # noqa: B019 - lives as long as the emulator
    def short(self, *ids: int) -> str:
        """Turn a few tokens into text, and remember it."""
        return self.decode(ids)


class TextStream:
    """Text of a growing list of tokens; characters cut in the middle wait for their rest."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        # Decoding begins at the last token whose text is out already: spaces and merges stay right.
        self._ids: list[int] = []
        self._told = ""

    def add(self, token: int) -> str:
        """Return the text that `token` completes."""
        if self._tokens.tokenizer is None:
            return ""
        self._ids.append(token)
        text = self._tokens.short(*self._ids)
        if len(text) <= len(self._told) or text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._told) :]
        self._ids = [token]
        self._told = self._tokens.short(token)
        return new

    def rest(self) -> str:
        """Return what is left at the end, cut characters included."""
        return self._tokens.short(*self._ids)[len(self._told) :]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment
