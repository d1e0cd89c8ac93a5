"""How many experts every layer keeps: from shapes alone, before any weight is read."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil, lcm

from minillm_jax.budget.inventory import kept_count
from minillm_jax.errors import InputError, warn
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, Routing, Sizes
from minillm_jax.model.costs import block_parameters, cost
from minillm_jax.settings import Budget

# PyTorch's grouped products take experts whose rows are multiples of 16 bytes, 8 numbers of bfloat16.
ALIGNED = 8

# A larger share of removed experts gets a warning. Published results of REAP hold up at a half for models of many
# similar experts, and collapse there for others (arXiv 2510.13999).
SAFE_SHARE = 0.25


def experts_of(config: DecoderConfig, sizes: Sizes) -> int:
    """The number of experts of a layer that has experts.

    Raises:
      InputError: the model has none.
    """
    if config.routing is None:
        raise InputError(f"this {config.family} model has no experts; use --structures heads or channels")
    return max(layer.X for layer in sizes.layers)


def width_of(config: DecoderConfig, sizes: Sizes) -> int:
    """The channels of an expert.

    Raises:
      InputError: the model has no experts.
    """
    experts_of(config, sizes)
    return max(layer.W for layer in sizes.layers)


def width_to_keep(config: DecoderConfig, sizes: Sizes, budget: Budget) -> int:
    """The number of channels that every expert keeps: a share of them, rounded up to a multiple of 8.

    Raises:
      InputError: the model has no experts.
    """
    return kept_count(width_of(config, sizes), budget.ratio or 0.0, lcm(budget.round_width_to, ALIGNED))


def with_experts(sizes: Sizes, keep: int, width: int | None = None) -> Sizes:
    """The sizes with so many experts in every layer that has experts, and with so many channels in each expert."""
    layers = (
        replace(layer, X=min(layer.X, keep), W=layer.W if width is None else min(layer.W, width))
        for layer in sizes.layers
    )
    return replace(sizes, layers=tuple(layers))


def sizes_left(config: DecoderConfig, sizes: Sizes, budget: Budget) -> Sizes:
    """The sizes after experts, and channels inside experts, are removed as the structures of a budget say.

    Raises:
      InputError: see `experts_to_keep`.
    """
    if "experts" in budget.structures:
        sizes = with_experts(sizes, experts_to_keep(config, sizes, budget))
    if "expert-channels" in budget.structures:
        sizes = with_experts(sizes, experts_of(config, sizes), width_to_keep(config, sizes, budget))
    return sizes


def experts_to_keep(config: DecoderConfig, sizes: Sizes, budget: Budget) -> int:
    """The number of experts that every layer keeps.

    Warns where more than a quarter of the experts are removed.

    Args:
      config: of the dense model.
      sizes: of the dense model.
      budget: a ratio of the experts, or of the parameters, or a target.

    Raises:
      InputError: the model has no experts; or no number of experts meets the budget, none is removed, or fewer would
        be left than a token chooses.
    """
    count = experts_of(config, sizes)
    assert config.routing is not None, "checked by experts_of"
    counts = list(_possible(config.routing, count, budget.round_experts_to))
    if len(counts) == 1:
        raise InputError(
            f"no expert can be removed: a layer has {count}, a token needs {_fewest(config.routing, count)}, and the "
            f"kept ones must be a multiple of {_step(config.routing, budget.round_experts_to)}; use a smaller "
            "--round-experts-to, or prune heads"
        )
    keep = _by_share(budget, count, counts) if budget.counts_groups else _by_cost(config, sizes, budget, counts)
    if keep == count:
        raise InputError(
            f"none of the {count} experts would be removed: {_amount(budget)} rounds to none; use a ratio of at least "
            f"{ceil(1000 * (1 - counts[-2] / count)) / 1000:g}, or a smaller --round-experts-to"
        )
    if 1 - keep / count > SAFE_SHARE:
        warn(
            f"{count - keep} of {count} experts of every layer are removed, more than a quarter; whether the others "
            "can do their work depends on the model: compare perplexity and tasks before and after, or recover"
        )
    return keep


def _possible(routing: Routing, count: int, multiple: int) -> Iterator[int]:
    """The numbers of experts that a layer may keep, ascending: equally many of each group of experts."""
    step, least = _step(routing, multiple), _fewest(routing, count)
    yield from (keep for keep in range(step, count, step) if keep >= least)
    yield count


def _step(routing: Routing, multiple: int) -> int:
    return lcm(multiple, routing.groups)


def _fewest(routing: Routing, count: int) -> int:
    """The fewest experts with which every token still finds as many as it chooses, in the groups that it chooses."""
    in_groups = ceil(Fraction(routing.chosen * routing.groups, routing.chosen_groups))
    return min(count, max(routing.chosen, in_groups))


def _by_share(budget: Budget, count: int, counts: list[int]) -> int:
    asked = kept_count(count, budget.ratio or 0.0)
    if asked < counts[0]:
        raise InputError(
            f"a ratio of {budget.ratio:g} keeps {asked} of {count} experts, but {counts[0]} at least must be kept, "
            f"because a token chooses among them; use a ratio of at most {1 - counts[0] / count:.3g}"
        )
    return next(keep for keep in counts if keep >= asked)


def _by_cost(config: DecoderConfig, sizes: Sizes, budget: Budget, counts: list[int]) -> int:
    """The most experts with which the model costs no more than the budget."""

    def left(keep: int) -> int:
        decoder = build(config, with_experts(sizes, keep))
        return cost(decoder, budget.measure, budget.window)

    dense = build(config, sizes)
    if budget.target is not None:
        most = budget.target[1]
    else:
        prunable = left(counts[-1]) if budget.ratio_of == "model" else block_parameters(dense)
        most = left(counts[-1]) - (budget.ratio or 0.0) * prunable
    fitting = [keep for keep in counts if left(keep) <= most]
    if not fitting:
        raise InputError(
            f"{_amount(budget)} cannot be met by removing experts: with the fewest, {counts[0]} of {counts[-1]}, "
            f"{left(counts[0]):,} {budget.measure} are left; use a smaller ratio or a larger target"
        )
    return fitting[-1]


def _amount(budget: Budget) -> str:
    if budget.target is not None:
        return f"a target of {budget.target[1]:,.0f} {budget.target[0]}"
    return f"a ratio of {budget.ratio:g}"
