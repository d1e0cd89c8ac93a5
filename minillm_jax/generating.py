"""Generation of text by a loaded model: the public function `generate`.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> mj.generate(model, ["Once upon a time"], max_tokens=40)
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from minillm_jax.data import chat as conversations
from minillm_jax.data import text as texts
from minillm_jax.data.text import in_vocabulary
from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.data.windows import whole_number
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import Sampling, steps
from minillm_jax.model.loaded import Model

GENERATION_CONFIG = "generation_config.json"
EOS = "eos_token_id"

# Number of a prompt, and the text that follows what was told of it before.
Told = Callable[[int, str], None]


def generate(
    model: Model,
    prompts: str | Sequence[str],
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    told: Told | None = None,
) -> list[str]:
    """The text that follows each prompt.

    Args:
      model: any model.
      prompts: a prompt, or several; their texts do not depend on each other.
      max_tokens: tokens of a text at most; the model's end-of-sequence token ends it earlier.
      temperature: divisor of the logits; 0 takes the most probable token every time.
      top_p: tokens are drawn from the most probable ones, whose probabilities reach `top_p` together, in (0, 1].
      seed: draws the tokens.
      chat: whether a prompt is a message of the user, which the chat template of the tokenizer writes.
      told: called with the number of a prompt and each further piece of its text.

    Raises:
      InputError: an argument is out of its range, the tokenizer cannot be used, or the prompt is empty or too long.
    """
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise InputError("no prompt is given; give at least one")
    sampling = sampling_of(temperature, top_p, seed)
    count = _at_least(1, "--max-tokens", max_tokens)
    tokenizer = texts.tokenizer_of(model.folder)()
    ids = [prompt_tokens(tokenizer, prompt, chat, model) for prompt in given]
    pieces = [Pieces(tokenizer, prompt) for prompt in ids]
    for tokens in steps(model.decoder, ids, count, sampling, stop_tokens(model, tokenizer)):
        for number, (piece, token) in enumerate(zip(pieces, tokens, strict=True)):
            more = "" if token is None else piece.add(token)
            if more and told is not None:
                told(number, more)
    return [piece.whole() for piece in pieces]


def sampling_of(temperature: float, top_p: float, seed: int) -> Sampling:
    """Settings of the sampling, checked.

    Raises:
      InputError: one is out of its range.
    """
    if not 0 <= temperature < float("inf"):
        raise InputError(
            f"--temperature {temperature}: expected a number of at least 0; 0 takes the most probable token"
        )
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}: expected a number in (0, 1]")
    if top_p < 1 and not temperature:
        raise InputError(f"--top-p {top_p} would do nothing at temperature 0; give a --temperature, 0.8 for example")
    return Sampling(float(temperature), float(top_p), _at_least(0, "--seed", seed))


def _at_least(least: int, flag: str, value: int) -> int:
    """A whole number that is at least `least`.

    Raises:
      InputError: it is something else.
    """
    if whole_number(flag, value) < least:
        raise InputError(f"{flag} {value}: expected a whole number of at least {least}")
    return int(value)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, chat: bool, model: Model) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer or its chat template puts before a text.

    Raises:
      InputError: the tokenizer has no chat template, or gives tokens that the model does not know.
    """
    text = conversations.question(tokenizer, prompt) if chat else prompt
    ids = tokenizer.call(text, add_special_tokens=not chat)["input_ids"]
    in_vocabulary(np.asarray(ids, np.int64), model.decoder.embedding.shape[0], "the prompt")
    # Some tokenizers close every text, which would end the prompt before it is continued.
    return ids[:-1] if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos else ids


def stop_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a text: by generation_config.json, else config.json, else the tokenizer."""
    path = model.folder / GENERATION_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named: Any = next((one[EOS] for one in (settings, model.raw_config) if one.get(EOS) is not None), tokenizer.eos)
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

    def whole(self) -> str:
        """The text behind the prompt."""
        return self._read()[self._start :]

    def _read(self) -> str:
        return self._decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
