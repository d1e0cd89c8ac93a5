"""A request without any effect is an error before work, and one with a part of its effect is a warning."""

import warnings
from pathlib import Path
from typing import Any

import pytest

import minillm_jax as mj
from convert.reader import describe_model
from minillm_jax import demo
from minillm_jax import plan as plans
from minillm_jax.budget.expected import pruned_sizes
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.loaded import Model
from minillm_jax.model.ops import Rope
from minillm_jax.model.tree import group_counts
from minillm_jax.recipes.recipe import Recipe, load, with_options
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget, Refit, Scoring
from minillm_jax.stages import prune_in_rounds, prune_model
from tests.helpers import random_tokens, small_decoder

CONFIG = DecoderConfig("llama", norm_epsilon=1e-5, rope=Rope(10000.0))


def sizes_of(*layers: tuple[int, int, int]) -> Sizes:
    """Sizes of a small model: query heads, key/value heads and channels of each layer."""
    return Sizes(V=61, D=16, H=4, layers=tuple(LayerSizes(N=n, K=k, F=f) for n, k, f in layers))


ONE_HEAD, TWO_HEADS = sizes_of(*[(8, 1, 40)] * 4), sizes_of(*[(8, 2, 40)] * 4)


@pytest.mark.parametrize(
    ("sizes", "budget", "words"),
    [
        (
            ONE_HEAD,
            Budget(0.25, structures=("heads",)),
            "the only one of the key/value heads of a layer is always kept; use --heads query",
        ),
        (
            TWO_HEADS,
            Budget(0.2, structures=("heads",)),
            "a ratio of 0.2 of the 2 key/value heads of a layer rounds to none; use a ratio of at least 0.25 "
            "or --heads query",
        ),
        (
            ONE_HEAD,
            Budget(0.001),
            "a ratio of 0.001 of the 40 MLP channels of a layer rounds to none; leave out heads in .*, use a ratio of "
            "at least 0.013",
        ),
        (ONE_HEAD, Budget(0.05, heads="query", structures=("heads",)), "0.05 of the 8 query heads of a key/value head"),
        (
            TWO_HEADS,
            Budget(0.2, structures=("heads",), allocation="measured"),
            "a ratio of 0.2 of the 2 key/value heads of a layer rounds to none",
        ),
        (TWO_HEADS, Budget(0.1, structures=("layers",)), "0.1 of the 4 layers rounds to none; use a ratio of at least"),
        (
            TWO_HEADS,
            Budget(0.2, structures=("hidden",), round_width_to=16),
            "the number of hidden dimensions, 16, is kept by --round-width-to 16; use a smaller --round-width-to",
        ),
        (
            TWO_HEADS,
            Budget(0.2, structures=("channels",), round_width_to=64),
            "the number of MLP channels of a layer, 40, is kept by --round-width-to 64",
        ),
        (
            sizes_of((1, 1, 40)),
            Budget(0.5, structures=("heads",)),
            "the only one of the key/value heads of a layer is always kept; prune other --structures",
        ),
    ],
)
def test_a_request_without_any_effect_is_an_error(sizes: Sizes, budget: Budget, words: str) -> None:
    with pytest.raises(InputError, match=rf"nothing would be removed from this model: .*{words}"):
        pruned_sizes(CONFIG, sizes, budget)


@pytest.mark.parametrize(
    ("sizes", "budget", "words"),
    [
        (
            ONE_HEAD,
            Budget(0.25),
            "no key/value heads are removed: the only one .* use --heads query or leave out heads",
        ),
        (TWO_HEADS, Budget(0.2), "no key/value heads are removed: .* rounds to none; use a ratio of at least 0.25"),
        (ONE_HEAD, Budget(target_params=9000.0), "no key/value heads are removed: the only one of the key/value heads"),
        (ONE_HEAD, Budget(0.3, allocation="global"), "no key/value heads are removed: the only one"),
        (
            TWO_HEADS,
            Budget(0.3, structures=("channels", "heads"), round_heads_to=2),
            "no key/value heads are removed: the number .* is kept by --round-heads-to 2; use a smaller",
        ),
        (
            sizes_of((8, 4, 40), (8, 2, 40), (8, 2, 40), (8, 4, 40)),
            Budget(0.2, layers=(1, 4)),
            "layers 1, 2 lose no key/value heads: a ratio of 0.2 of the 2 key/value heads",
        ),
        (TWO_HEADS, Budget(0.1, structures=("layers", "channels")), "no layers are removed: a ratio of 0.1 of the 4"),
        (
            TWO_HEADS,
            Budget(0.3, structures=("hidden", "channels"), round_width_to=16),
            "no hidden dimensions are removed",
        ),
    ],
)
@pytest.mark.filterwarnings("always")
def test_a_request_with_a_part_of_its_effect_is_a_warning(sizes: Sizes, budget: Budget, words: str) -> None:
    with pytest.warns(InputWarning, match=words):
        pruned_sizes(CONFIG, sizes, budget)


@pytest.mark.parametrize(
    ("sizes", "budget"),
    [
        (ONE_HEAD, Budget(0.25, heads="query")),
        (TWO_HEADS, Budget(0.25)),
        (TWO_HEADS, Budget(0.3, ratio_of="model")),
        (TWO_HEADS, Budget(0.2, heads="query")),
        (TWO_HEADS, Budget(0.2, structures=("channels",))),
    ],
)
def test_the_ways_out_remove_groups_without_a_warning(sizes: Sizes, budget: Budget) -> None:
    pruned = pruned_sizes(CONFIG, sizes, budget)
    assert pruned is not None
    assert pruned.layers != sizes.layers


# ------------------------------------------------------------------------------ the same in every way of pruning


def small_model(sizes: Sizes) -> Model:
    return Model(small_decoder(sizes=sizes), {"model_type": "llama"}, Path("nowhere"), "small")


def calibration() -> Calibration:
    return Calibration(Batches(random_tokens(61, 4, 12)), "random", 0)


def test_prune_refuses_before_work_and_warns_about_a_part() -> None:
    model = small_model(sizes_of(*[(8, 1, 12)] * 2))
    with pytest.raises(InputError, match=r"nothing would be removed .* use --heads query"):
        mj.prune(model, calibration(), ratio=0.25, structures="heads", progress=lambda *_: pytest.fail("worked"))
    with pytest.warns(InputWarning, match="no key/value heads are removed"):
        pruned = mj.prune(model, calibration(), ratio=0.25, recipe="wanda-sp")
    assert group_counts(pruned.decoder, "channel") == [9, 9]


def test_plan_warns_like_the_run() -> None:
    described = describe_model(demo.FOLDER)
    recipe = used(*with_options(Recipe(), {"ratio": 0.05, "structures": "heads,channels", "budget": "uniform"})).recipe
    with pytest.warns(InputWarning, match="no key/value heads are removed"):
        assert plans.plan(described, "demo", recipe).parameters_after is not None
    recipe = used(*with_options(Recipe(), {"ratio": 0.05, "structures": "heads"})).recipe
    with pytest.raises(InputError, match="nothing would be removed from this model"):
        plans.plan(described, "demo", recipe)


def test_check_and_run_warn_once_in_one_process() -> None:
    """A run checks the shapes of the model before it loads them, and the stages check them again."""
    budget, sentences = Budget(0.2), []
    with warnings.catch_warnings():
        warnings.simplefilter("default", InputWarning)
        warnings.showwarning = lambda message, *rest, **more: sentences.append(str(message))
        for _ in range(2):
            pruned_sizes(CONFIG, TWO_HEADS, budget)
    assert len(sentences) == 1


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_an_allocation_that_takes_all_from_one_kind_says_so(allocation: str) -> None:
    """A step of heads is larger than all that has to be removed, so that channels alone meet the limit."""
    model = small_model(sizes_of(*[(8, 4, 12)] * 2))
    budget = Budget(0.02, ratio_of="model", allocation=allocation)
    with pytest.warns(InputWarning, match=f"the allocation {allocation} removes no key/value heads"):
        pruned = prune_in_rounds(model, calibration(), Scoring("wanda"), budget, Refit("none"))
    assert group_counts(pruned.decoder, "head") == [4, 4]


# ------------------------------------------------------------------------------------- layers that a recipe names


@pytest.mark.parametrize(("count", "instead"), [(2, "--layers all"), (4, "--layers 1:-1"), (6, "--layers 1:-1")])
def test_layers_of_a_recipe_are_not_blamed_on_the_user(count: int, instead: str) -> None:
    options: dict[str, Any] = {"ratio": 0.5}
    sizes, recipe = sizes_of(*[(8, 4, 40)] * count), with_options(load("llm-pruner"), options)[0]
    words = (
        rf"the recipe llm-pruner prunes layers 4:-2, all but the first 4 and the last 2, but this model has {count} "
        rf"layers; give other layers beside the recipe, {instead}"
    )
    with pytest.raises(InputError, match=words):
        plans.pruned_sizes(CONFIG, sizes, recipe)
    settings = used(recipe).recipe
    with pytest.raises(InputError, match=words):
        prune_model(Model(build(CONFIG, sizes), {}, Path("nowhere"), "small"), calibration(), settings)
    theirs = used(*with_options(recipe, {"layers": instead.removeprefix("--layers ")})).recipe
    assert plans.pruned_sizes(CONFIG, sizes, theirs) is not None


@pytest.mark.parametrize("options", [{"layers": "4:-2"}, {"layers": (4, -2)}])
def test_layers_of_the_user_are_named_as_such(options: dict[str, Any]) -> None:
    recipe = used(*with_options(load("llm-pruner"), options | {"ratio": 0.5})).recipe
    with pytest.raises(InputError, match=r"^layers 4:-2 are not a range of this model's layers; it has 0:4; use"):
        plans.pruned_sizes(CONFIG, TWO_HEADS, recipe)
    deep = sizes_of(*[(8, 4, 40)] * 7)
    assert plans.pruned_sizes(CONFIG, deep, recipe) is not None


def test_a_recipe_whose_choices_do_not_suit_the_structures_is_named() -> None:
    recipe = with_options(load("llm-pruner"), {"ratio": 0.5, "structures": "hidden"})
    with pytest.raises(InputError, match=r"the recipe llm-pruner prunes some layers only, .* give --layers all"):
        used(*recipe)
    used(*with_options(recipe[0], {"layers": "all", "structures": "layers"}))
    with pytest.raises(InputError, match="the recipe flap names another; give --budget uniform"):
        used(*with_options(load("flap"), {"ratio": 0.5, "structures": "layers"}))
