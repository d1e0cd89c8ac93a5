"""Where the beginning-of-sequence token stands in calibration and evaluation windows.

A model whose tokenizer puts that token by itself was trained on documents that each begin with it, packed one after the
other: calibration documents are joined in the same way. A window that begins in the middle of a document does not begin
with the token, because the model has not seen that (docs/LOG.md has figures). The exception is Gemma, which needs the
token before every text.
"""

from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.errors import InputError

# Families whose windows begin with the token, whatever follows. lm-evaluation-harness has the same rule.
NEED_FIRST_TOKEN = ("gemma", "gemma2", "gemma3_text")

# A short text, to see how the tokenizer begins.
_SOME_TEXT = "x"


def first_token(tokenizer: Tokenizer) -> int:
    """The beginning-of-sequence token.

    Raises:
      InputError: the tokenizer has none.
    """
    if tokenizer.bos is None:
        raise InputError(f"{tokenizer.folder}: the tokenizer has no beginning-of-sequence token; leave out --bos")
    return tokenizer.bos


def is_put_by(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before a text by itself."""
    return tokenizer.bos is not None and _ids(tokenizer, _SOME_TEXT, special=True)[:1] == [tokenizer.bos]


def of_windows(tokenizer: Tokenizer, bos: str, family: str) -> int | None:
    """The token that every window begins with; None where windows are text alone.

    Args:
      tokenizer: of the model.
      bos: `auto`, `yes`, `text` or `no`.
      family: of the model.

    Raises:
      InputError: the token is asked for, and the tokenizer has none.
    """
    wanted = bos == "yes" or (bos == "auto" and family in NEED_FIRST_TOKEN and is_put_by(tokenizer))
    return first_token(tokenizer) if wanted else None


def between_documents(tokenizer: Tokenizer, bos: str) -> str | None:
    """The text of the token that stands between calibration documents; None where a blank line does.

    Some tokenizers need a space behind the token to read the next word as they do at the beginning of a text.

    Args:
      tokenizer: of the model.
      bos: `auto`, `yes` or `no`.
    """
    if bos == "no" or tokenizer.bos is None or (bos == "auto" and not is_put_by(tokenizer)):
        return None
    token = str(getattr(tokenizer.call, "bos_token"))  # noqa: B009  a tokenizer of transformers
    alone = _ids(tokenizer, _SOME_TEXT)
    return next((text for text in (token, f"{token} ") if _ids(tokenizer, text + _SOME_TEXT)[1:] == alone), None)


def _ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    return list(tokenizer.call(text, add_special_tokens=special)["input_ids"])
