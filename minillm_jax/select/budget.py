"""How many groups stay, and which: per layer and kind, the best by score (local selection)."""

from collections.abc import Container, Mapping, Sequence
from decimal import Decimal
from math import floor

import numpy as np
from jaxtyping import Float

from minillm_jax.errors import InputError
from minillm_jax.groups import Kept


def kept_count(count: int, ratio: float) -> int:
    """How many of `count` groups stay: floor(count · ratio + 1/2) go, but at least one stays.

    The ratio is read as the decimal number it is written as: 0.29 of 50 is 14.5, although the float is a little less.
    """
    return max(1, count - floor(count * Decimal(str(ratio)) + Decimal("0.5")))


def select_local(
    scores: Mapping[str, Sequence[Float[np.ndarray, " _"]]], ratio: float, layers: Container[int] | None = None
) -> Kept:
    """The groups with the highest scores in every layer, by the same ratio for every kind; ties keep the lower index.

    Args:
      scores: kind -> one array of scores for each layer.
      ratio: share of the groups that goes, in (0, 1).
      layers: the layers that are pruned; all by default.

    Raises:
      InputError: the ratio is outside (0, 1), or a score is not finite.
    """
    if not 0 < ratio < 1:
        raise InputError(f"the ratio must lie between 0 and 1, both excluded, found {ratio:g}")
    kept: dict[str, list[np.ndarray]] = {}
    for kind, per_layer in scores.items():
        kept[kind] = []
        for layer, values in enumerate(per_layer):
            if not np.isfinite(values).all():
                raise InputError(f"the {kind} scores of layer {layer} are not finite; try another criterion or epsilon")
            pruned = layers is None or layer in layers
            stay = kept_count(len(values), ratio) if pruned else len(values)
            kept[kind].append(np.sort(np.argsort(-values, kind="stable")[:stay]))
    return kept
