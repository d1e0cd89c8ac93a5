"""How many experts a budget keeps, from shapes alone."""

from dataclasses import replace
from typing import Any

import pytest
import transformers

from minillm_jax.budget.expected import pruned_sizes
from minillm_jax.budget.experts import experts_to_keep, width_to_keep, with_experts
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.families import parse
from minillm_jax.model.tree import parameter_count
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget
from tests.helpers import MIXTURES, SMALL


def shapes(family: str, **changes: Any) -> tuple[DecoderConfig, Sizes]:
    settings = (SMALL | MIXTURES)[family] | changes
    return parse(transformers.AutoConfig.for_model(family, **settings).to_dict(), "config.json")


def budget(ratio: float | None = None, **more: Any) -> Budget:
    return Budget(ratio, structures=("experts",), **more)


@pytest.mark.parametrize(
    ("asked", "keep"),
    [
        (budget(0.25), 12),
        (budget(0.2), 13),
        (budget(0.2, round_experts_to=4), 16),
        (budget(0.25, round_experts_to=4), 12),
    ],
)
def test_a_ratio_is_the_share_of_removed_experts_rounded_up_to_a_multiple(asked: Budget, keep: int) -> None:
    config, sizes = shapes("mixtral", num_local_experts=16)
    if keep == 16:
        with pytest.raises(
            InputError, match=r"none of the 16 experts would be removed: .*use a ratio of at least 0\.25"
        ):
            experts_to_keep(config, sizes, asked)
    else:
        assert experts_to_keep(config, sizes, asked) == keep


def test_a_target_keeps_as_many_experts_as_it_has_room_for() -> None:
    config, sizes = shapes("mixtral", num_local_experts=16)
    counts = {keep: parameter_count(build(config, with_experts(sizes, keep))) for keep in (13, 14)}
    for spare in (0, 5):
        assert experts_to_keep(config, sizes, budget(target_params=counts[13] + spare)) == 13
    assert experts_to_keep(config, sizes, budget(target_params=counts[14] - 1)) == 13
    whole = parameter_count(build(config, sizes))
    assert experts_to_keep(config, sizes, budget(1 - counts[14] / whole - 1e-9, ratio_of="model")) == 14


def test_experts_keep_a_multiple_of_eight_channels() -> None:
    config, sizes = shapes("mixtral", intermediate_size=64)
    asked = Budget(0.2, structures=("expert-channels",))
    assert width_to_keep(config, sizes, asked) == 56
    assert width_to_keep(config, sizes, replace(asked, round_width_to=32)) == 64
    smaller = pruned_sizes(config, sizes, asked)
    assert smaller is not None
    assert {(layer.X, layer.W) for layer in smaller.layers} == {(6, 56)}


def test_equally_many_experts_of_every_group_are_kept() -> None:
    config, sizes = shapes("glm4_moe", n_routed_experts=16, n_group=4, topk_group=2)
    assert experts_to_keep(config, sizes, budget(0.3)) == 12


def test_heads_and_channels_have_an_allocation_of_their_own() -> None:
    """The ratio is a share of the experts, of the heads and of the channels; the losses share the latter two out."""
    structures = ("heads", "channels", "experts")
    asked = used(Recipe(budget=Budget(0.25, structures=structures))).recipe.budget
    assert asked.allocation == "curves"
    config, sizes = shapes("qwen2_moe", num_experts=8)
    assert experts_to_keep(config, sizes, asked) == 6
    assert pruned_sizes(config, sizes, asked) is None
    assert used(Recipe(budget=Budget(0.25, structures=("experts",)))).recipe.budget.allocation == "uniform"


def test_more_than_a_quarter_warns() -> None:
    with pytest.warns(InputWarning, match="4 of 6 experts of every layer are removed, more than a quarter"):
        assert experts_to_keep(*shapes("mixtral"), budget(0.6)) == 2


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        ("llama", budget(0.5), "this llama model has no experts; use --structures heads or channels"),
        ("mixtral", budget(0.9), r"keeps 1 of 6 experts, but 2 at least .*use a ratio of at most 0\.667"),
        ("mixtral", budget(0.05), "none of the 6 experts would be removed"),
        ("mixtral", budget(0.5, round_experts_to=6), "no expert can be removed: a layer has 6, a token needs 2"),
        ("mixtral", budget(target_params=1000), "a target of 1,000 parameters cannot be met by removing experts"),
        ("glm4_moe", budget(0.5), "keeps 4 of 8 experts, but 6 at least must be kept"),
    ],
)
def test_a_budget_that_experts_cannot_meet_is_one_sentence(family: str, asked: Budget, message: str) -> None:
    with pytest.raises(InputError, match=message):
        experts_to_keep(*shapes(family), asked)
