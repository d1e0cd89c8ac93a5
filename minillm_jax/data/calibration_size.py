"""How many calibration windows a model needs, and how long they are, where the user does not say so.

The refit and structured OBS solve systems with the Gram matrix of the inputs of the MLP's output projection, which has
a row for each of the F channels. Such a matrix has full rank from F tokens on, and is well known from a few times F.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import run_letters

# Calibration tokens for each channel of the widest MLP. On a 30-layer LLaMA 16 give 5 % less perplexity than 8, and
# forward passes are a small part of the run (docs/quality.md).
FACTOR = 16
# Calibration tokens at least.
LEAST = 8192
# Channels of the widest MLP from which on a window has so many tokens; the first line that fits counts.
LENGTHS = ((8192, 2048), (4096, 512), (0, 128))

# A text that is too short for windows of the length above is cut into shorter ones, as long as it makes fewer windows
# than `FEWEST` and they have at least `SHORTEST` tokens.
FEWEST, SHORTEST = 16, 128

# Below this, the Gram matrix of a projection's inputs is close to singular and the ridge decides the refit.
FEW_TOKENS_PER_CHANNEL = 2.0


@dataclass(frozen=True)
class Size:
    """Number and length of the calibration windows.

    Attributes:
      samples: number of windows.
      length: tokens of a window.
      tokens: tokens of all windows that suit the model.
      fewer: whether a short text may give fewer windows, because nobody has named their number.
      shorter: whether a short text may give shorter windows.
    """

    samples: int
    length: int
    tokens: int = 0
    fewer: bool = False
    shorter: bool = False


def widest_mlp(decoder: Decoder) -> int:
    """The channels of the widest MLP or expert of a decoder, which may be abstract."""
    return max(max(run_letters(run)[letter] for letter in "FW") for run in decoder.runs)


def size_for(width: int, positions: int | None, samples: int | None = None, length: int | None = None) -> Size:
    """The windows that suit a model: `FACTOR` tokens for each channel of its widest MLP, and `LEAST` tokens at least.

    Args:
      width: channels of the widest MLP, F.
      positions: tokens that the model was trained for or has positions for; None without a limit.
      samples: number of windows, where the user names it.
      length: tokens of a window, where the user names it.
    """
    tokens = max(LEAST, FACTOR * width)
    suited = next(long for channels, long in LENGTHS if width >= channels)
    chosen = min(suited, positions or suited) if length is None else length
    count = -(-tokens // max(1, chosen)) if samples is None else samples
    return Size(count, chosen, tokens, fewer=samples is None, shorter=length is None)


def fitted(size: Size, windows: Callable[[int], int]) -> Size:
    """The windows for one text: fewer and shorter ones where it is short, as far as nobody has named the numbers.

    Args:
      size: the windows that suit the model.
      windows: tokens of a window -> number of windows that the text makes.
    """
    length = size.length
    enough = min(size.samples, FEWEST) if size.fewer else size.samples
    while size.shorter and length // 2 >= SHORTEST and windows(length) < enough:
        length //= 2
    if not size.fewer:
        return replace(size, length=length)
    return replace(size, samples=max(1, min(-(-size.tokens // length), windows(length))), length=length)


def few_tokens(samples: int, length: int, per_channel: float) -> str:
    """A sentence about too few calibration tokens, and what helps; the empty text where they are enough.

    Args:
      samples: number of windows.
      length: tokens of a window.
      per_channel: calibration tokens for each channel of the widest MLP.
    """
    if per_channel >= FEW_TOKENS_PER_CHANNEL:
        return ""
    suited = max(LEAST, FACTOR * samples * length / per_channel)
    return (
        f"{per_channel:.2f} calibration tokens for each MLP channel are few: below {FEW_TOKENS_PER_CHANNEL:g} the "
        f"ridge decides the refit; use --samples {-int(-suited // length)}, and a longer text where this one is too "
        "short"
    )
