"""Generation of text by a loaded model: the public function `generate`.

>>> import minillm_jax as mj

>>> model = mj.load("path/or/hub-id")
>>> mj.generate(model, ["Once upon a time"], max_tokens=40)
"""

from collections.abc import Callable, Mapping, Sequence

from minillm_jax.data import text as texts
from minillm_jax.data.batches import Batches
from minillm_jax.data.prompts import Pieces, prompt_tokens, stop_tokens
from minillm_jax.data.tokenizer import has_vocabulary
from minillm_jax.data.windows import whole_number
from minillm_jax.errors import InputError
from minillm_jax.evaluation.generate import Sampling, steps
from minillm_jax.evaluation.generate import generate as generate_tokens
from minillm_jax.model.loaded import Model
from minillm_jax.model.streamed import check_in_memory

# Tokens of the beginnings that several models continue, and of the texts behind them.
BEGINNING, CONTINUED = 16, 48

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
    check_in_memory(model.decoder, "generation")
    sampling = sampling_of(temperature, top_p, seed)
    count = _at_least(1, "--max-tokens", max_tokens)
    tokenizer = texts.tokenizer_of(model.folder)()
    vocabulary = model.decoder.embedding.shape[0]
    ids = [prompt_tokens(tokenizer, prompt, chat, vocabulary) for prompt in given]
    pieces = [Pieces(tokenizer, prompt) for prompt in ids]
    stops = stop_tokens(model.folder, model.text_values, tokenizer)
    for tokens in steps(model.decoder, ids, count, sampling, stops):
        for number, (piece, token) in enumerate(zip(pieces, tokens, strict=True)):
            more = "" if token is None else piece.add(token)
            if more and told is not None:
                told(number, more)
    return [piece.whole() for piece in pieces]


def continuations(models: Mapping[str, Model], windows: Batches, count: int) -> list[dict[str, str]]:
    """Texts of several models behind the same beginnings of a text, greedy; none without a tokenizer.

    Args:
      models: by name; they have the same tokens.
      windows: of the text; the beginnings are those of evenly spaced windows.
      count: number of beginnings.

    Returns:
      For each beginning, its text as `prompt` and the text of every model by its name.
    """
    first = next(iter(models.values()))
    if not count or not has_vocabulary(first.folder):
        return []
    tokenizer = texts.tokenizer_of(first.folder)()
    length = min(BEGINNING, windows.length)
    ids = [row[:length].tolist() for row in windows.spaced(min(count, windows.count)).windows]
    stops = stop_tokens(first.folder, first.text_values, tokenizer)
    found = [{"prompt": Pieces(tokenizer, []).of(row)} for row in ids]
    for name, model in models.items():
        for row, prompt, tokens in zip(
            found, ids, generate_tokens(model.decoder, ids, CONTINUED, stops=stops), strict=True
        ):
            row[name] = Pieces(tokenizer, prompt).of(tokens)
    return found


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
