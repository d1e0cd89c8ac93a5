"""How many groups stay, and which: per layer and kind, the best by score (local selection)."""

from collections.abc import Container, Mapping, Sequence
from decimal import Decimal
from math import floor

import numpy as np
from jaxtyping import Float

from minillm_jax.errors import InputError
from minillm_jax.groups import Kept


def kept_count(count: int, ratio: float, multiple: int = 1) -> int:
    """How many of `count` groups stay: floor(count · ratio + 1/2) go, but at least one stays.

    The ratio is read as the decimal number it is written as: 0.29 of 50 is 14.5, although the float is a little less.
    With a `multiple`, the number is rounded up to one; to the largest there is when that is more than `count`, and
    to `count` itself when there is none.
    """
    asked = max(1, count - floor(count * Decimal(str(ratio)) + Decimal("0.5")))
    rounded = min(-(-asked // multiple), count // multiple) * multiple
    return rounded or count


def select_local(
    scores: Mapping[str, Sequence[Float[np.ndarray, " _"]]],
    ratio: float,
    layers: Container[int] | None = None,
    round_to: Mapping[str, int] | None = None,
) -> Kept:
    """The groups with the highest scores in every layer, by the same ratio for every kind; ties keep the lower index.

    Args:
      scores: kind -> one array of scores for each layer.
      ratio: share of the groups that goes, in (0, 1).
      layers: the layers that are pruned; all by default.
      round_to: kind -> what the number of kept groups should be a multiple of, for the hardware (see `kept_count`).

    Raises:
      InputError: the ratio is outside (0, 1), a multiple is less than 1, or a score is not finite.
    """
    if not 0 < ratio < 1:
        raise InputError(f"the ratio must lie between 0 and 1, both excluded, found {ratio:g}")
    for kind, multiple in (round_to or {}).items():
        if multiple < 1:
            raise InputError(
                f"the number of kept groups ({kind}) can be rounded to multiples of at least 1, not {multiple}"
            )
    kept: dict[str, list[np.ndarray]] = {}
    for kind, per_layer in scores.items():
        kept[kind] = []
        for layer, values in enumerate(per_layer):
            if not np.isfinite(values).all():
                raise InputError(f"the {kind} scores of layer {layer} are not finite; try another criterion or epsilon")
            pruned = layers is None or layer in layers
            stay = kept_count(len(values), ratio, (round_to or {}).get(kind, 1)) if pruned else len(values)
            kept[kind].append(np.sort(np.argsort(-values, kind="stable")[:stay]))
    return kept
