"""The pruned shapes as far as the dense shapes decide them, and whether a budget removes what it is asked to remove.

Nothing here reads weights. A run checks its budget with `pruned_sizes` before it loads them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from minillm_jax.budget import allocate
from minillm_jax.budget.budget import by_ratio, choose
from minillm_jax.budget.experts import ALIGNED, experts_of, sizes_left, width_of
from minillm_jax.budget.inventory import Counts, Inventory, kept_count
from minillm_jax.errors import InputError, warn
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import group_counts, part_counts, sizes_of
from minillm_jax.pruning.slicing import slice_sizes
from minillm_jax.settings import BY_CURVES, Budget

# Kind of group -> what a sentence calls it, and the structure that names it in the options.
_WORDS = {
    "head": ("key/value heads", "heads"),
    "query": ("query heads", "heads"),
    "channel": ("MLP channels", "channels"),
    "expert": ("experts", "experts"),
    "expert_channel": ("channels of an expert", "expert-channels"),
    "hidden": ("hidden dimensions", "hidden"),
    "layer": ("layers", "layers"),
}


def pruned_sizes(config: DecoderConfig, sizes: Sizes, budget: Budget, named_by: str | None = None) -> Sizes | None:
    """The sizes of the pruned decoder; None where scores or losses decide them.

    Warns where one of the asked kinds of groups stays as it is.

    Args:
      config: of the dense model.
      sizes: of the dense model.
      budget: how much is removed, and where.
      named_by: the recipe that names the layers of the budget; None where the user does.

    Raises:
      InputError: the budget does not suit the model, cannot be met, or removes nothing.
    """
    dense, ratio, effects = sizes, budget.ratio or 0.0, []
    layers = allocate.layers_of(budget, len(sizes.layers), named_by)
    if "layers" in budget.structures:
        kept = kept_count(len(layers), ratio)
        effects.append(_Effect("layer", 1, [len(layers)], [kept]))
        sizes = replace(sizes, layers=sizes.layers[: len(sizes.layers) - len(layers) + kept])
    if "hidden" in budget.structures:
        width = kept_count(sizes.D, ratio, budget.round_width_to)
        effects.append(_Effect("hidden", budget.round_width_to, [sizes.D], [width]))
        sizes = replace(sizes, D=width, E=sizes.E if config.embedding_projection else width)
    before, sizes = sizes, sizes_left(config, sizes, budget)
    if "experts" in budget.structures:
        effects.append(
            _Effect("expert", budget.round_experts_to, *([experts_of(config, one)] for one in (before, sizes)))
        )
    if "expert-channels" in budget.structures:
        effects.append(_Effect("expert_channel", ALIGNED, *([width_of(config, one)] for one in (before, sizes))))
    queries = max(layer.N // max(layer.K, 1) for layer in dense.layers)
    if not budget.kinds:
        _check(effects, budget, queries)
        return sizes
    abstract = build(config, sizes)
    inventory = allocate.inventory_of(abstract, budget.kinds, budget)
    counts = allocate.expected(abstract, budget.kinds, budget)
    _check([*effects, *_effects(inventory, budget, counts)], budget, queries)
    return None if counts is None else sizes_with(abstract, counts)


def sizes_with(abstract: Decoder, counts: Counts) -> Sizes:
    """The sizes of a decoder with these numbers of kept groups.

    Args:
      abstract: the dense decoder; only its shapes are read.
      counts: kind -> for each layer, the number of kept groups.
    """
    equal = {kind: [np.zeros(n) for n in group_counts(abstract, kind)] for kind in counts}
    return slice_sizes(sizes_of(abstract), choose(equal, counts, part_counts(abstract, counts)))


@dataclass(frozen=True)
class _Effect:
    """What a budget does to one kind of groups.

    Attributes:
      kind: of `_WORDS`.
      multiple: that the number of kept steps is rounded to.
      before: number of steps (see `budget.inventory`) of every pruned layer, or of the whole model.
      after: number of kept steps; the fewest that an allocation may keep where the shapes do not decide it.
      layers: the pruned layers; none for steps of the whole model.
    """

    kind: str
    multiple: int
    before: list[int]
    after: list[int]
    layers: Sequence[int] | None = None

    @property
    def unchanged(self) -> list[int]:
        """The places that keep all their groups."""
        return [place for place, n in enumerate(self.before) if self.after[place] == n]


def _effects(inventory: Inventory, budget: Budget, counts: Counts | None) -> Iterator[_Effect]:
    """For each kind of groups inside the layers: by the counts, or by the fewest groups where they are not known."""
    if counts is None:
        # A share of the groups that rounds to none leaves unequal allocations nothing to share.
        shares = by_ratio(inventory, budget.ratio or 0.0, budget)
        rounded = budget.target is None and budget.ratio_of == "groups" and all(map(budget.single, inventory.counts))
        nothing = rounded and shares == inventory.counts
        counts = shares if nothing else inventory.fewest(budget)
    for kind, after in counts.items():
        before, parts = inventory.counts[kind], inventory.parts[kind]
        layers = [layer for layer in inventory.layers if before[layer]]
        steps, kept = ([n[layer] // parts[layer] for layer in layers] for n in (before, after))
        if layers:
            yield _Effect(kind, budget.multiple(kind), steps, kept, layers)


def _check(effects: list[_Effect], budget: Budget, queries: int) -> None:
    """Refuses a budget without any effect, and warns about every kind that stays as it is, somewhere or everywhere.

    Args:
      effects: on every asked kind.
      budget: the budget.
      queries: number of query heads of a key/value head.

    Raises:
      InputError: nothing is removed.
    """
    idle = [effect for effect in effects if effect.unchanged]
    if not effects:
        names = " and ".join(budget.structures)
        raise InputError(f"this model has no {names} that can be removed; use --structures experts, heads or layers")
    if all(len(effect.unchanged) == len(effect.before) for effect in effects):
        reasons = " and ".join(_reason(effect, budget) for effect in idle)
        ways = dict.fromkeys(way for effect in idle for way in _ways(effect, budget, queries))
        raise InputError(f"nothing would be removed from this model: {reasons}; {_or(list(ways))}")
    for effect in idle:
        words = _WORDS[effect.kind][0]
        if len(effect.unchanged) == len(effect.before):
            what = f"no {words} are removed"
        else:
            assert effect.layers is not None, "there is one number of layers, and one hidden size"
            what = f"layers {', '.join(str(effect.layers[place]) for place in effect.unchanged)} lose no {words}"
        warn(f"{what}: {_reason(effect, budget)}; {_or(_ways(effect, budget, queries))}")


def _rounds_to_none(steps: int, budget: Budget) -> bool:
    """Whether the asked share of the steps is none, before any rounding to multiples."""
    return budget.ratio is not None and budget.ratio_of == "groups" and kept_count(steps, budget.ratio) == steps


def _reason(effect: _Effect, budget: Budget) -> str:
    steps, words = effect.before[effect.unchanged[0]], _WORDS[effect.kind][0]
    of = "" if effect.layers is None else " of a key/value head" if effect.kind == "query" else " of a layer"
    if steps == 1:
        return f"the only one of the {words}{of} is always kept"
    if _rounds_to_none(steps, budget):
        return f"a ratio of {budget.ratio:g} of the {steps} {words}{of} rounds to none"
    if effect.multiple > 1:
        return f"the number of {words}{of}, {steps}, is kept by {budget.multiple_flag(effect.kind)} {effect.multiple}"
    if budget.uniform:
        return f"the share that the budget takes from the {steps} {words}{of} rounds to none"
    return f"--keep-at-least {budget.keep_at_least:g} keeps all of the {steps} {words}{of}"


def _ways(effect: _Effect, budget: Budget, queries: int) -> list[str]:
    """What the user can do so that groups of the kind are removed."""
    steps, structure = effect.before[effect.unchanged[0]], _WORDS[effect.kind][1]
    inside, ways = effect.layers is not None, []
    if steps > 1 and _rounds_to_none(steps, budget):
        ways.append(f"use a ratio of at least {ceil(500 / steps) / 1000:g}")
        if set(budget.structures) == {"heads", "channels"}:
            ways.append("--ratio-of model, which takes more of the other groups")
    elif steps > 1 and effect.multiple > 1:
        ways.append(f"use a smaller {budget.multiple_flag(effect.kind)}")
    elif steps > 1 and not budget.uniform:
        ways.append("use a smaller --keep-at-least")
    elif steps > 1:
        ways.append("use a larger ratio" if budget.target is None else "use a smaller target")
    of_queries = kept_count(queries, budget.ratio or 0.5, effect.multiple)
    if effect.kind == "head" and of_queries < queries:
        ways.append("--heads query")
    if inside and steps == 1 and set(budget.structures) != {structure}:
        ways.append(f"leave out {structure} in --structures")
    return ways or ["prune other --structures"]


def _or(ways: list[str]) -> str:
    """`use X, Y, or Z`."""
    first, *rest = ways
    if not first.startswith(("use", "leave", "prune")):
        first = f"use {first}"
    return first if not rest else f"{', '.join([first, *rest[:-1]])}{',' if len(rest) > 1 else ''} or {rest[-1]}"


def warn_of_idle_kinds(before: Counts, after: Counts, budget: Budget) -> None:
    """Warns about every kind of groups of which an unequal allocation removes none.

    The allocations by curves are meant to choose between the kinds, so they are silent.
    """
    silent = budget.uniform or budget.allocation in BY_CURVES
    for kind, counts in after.items():
        if not silent and list(counts) == list(before[kind]):
            warn(
                f"the allocation {budget.allocation} removes no {_WORDS[kind][0]}: the other groups are cheaper to "
                f"remove; leave out {_WORDS[kind][1]} in --structures, or use --budget uniform to remove some"
            )
