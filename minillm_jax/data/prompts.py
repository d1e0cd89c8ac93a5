"""Prompts to token ids, the tokens that end a text, and token ids back to text."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm_jax.data.chat import question as chat_question
from minillm_jax.data.text import in_vocabulary
from minillm_jax.data.tokenizing import Tokenizer

GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"


def prompt_tokens(tokenizer: Tokenizer, prompt: str, chat: bool, vocabulary: int) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer or its chat template puts before a text.

    Args:
      tokenizer: of the model.
      prompt: the text.
      chat: whether it is a message of the user, which the chat template writes.
      vocabulary: number of token ids of the model.

    Raises:
      InputError: the tokenizer has no chat template, or gives tokens that the model does not know.
    """
    text = chat_question(tokenizer, prompt) if chat else prompt
    ids = tokenizer.call(text, add_special_tokens=not chat)["input_ids"]
    in_vocabulary(np.asarray(ids, np.int64), vocabulary, "the prompt")
    # Some tokenizers close every text, which would end the prompt before it is continued.
    return ids[:-1] if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos else ids


def stop_tokens(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text: by generation_config.json, else config.json, else the tokenizer.

    Args:
      folder: of the model.
      config: config.json of the model.
      tokenizer: of the model.
    """
    path = folder / GENERATION_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named: Any = next((one[EOS] for one in (settings, config) if one.get(EOS) is not None), tokenizer.eos)
    return set(named if isinstance(named, Iterable) else [] if named is None else [named])


class Pieces:
    """The text behind a prompt, token by token.

    A token may be a part of a character, and the text of a token may depend on those before it. The text is therefore
    read from all tokens, and an unfinished character is held back.

    Args:
      tokenizer: of the model.
      prompt: token ids of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode: Callable[..., str] = getattr(tokenizer.call, "decode")  # noqa: B009  of transformers
        self._ids, self._start = list(prompt), 0
        self._start = self._told = len(self._read())

    def add(self, token: int) -> str:
        """The further text with one more token."""
        self._ids.append(token)
        text = self._read()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        more, self._told = text[self._told :], max(self._told, len(text))
        return more

    def of(self, tokens: Sequence[int]) -> str:
        """The text behind the prompt with all of some tokens."""
        self._ids.extend(tokens)
        return self.whole()

    def whole(self) -> str:
        """The text behind the prompt."""
        return self._read()[self._start :]

    def _read(self) -> str:
        return self._decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
