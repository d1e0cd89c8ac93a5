"""Whole sublayers as levels of a budget: attention and MLP of single layers are removed where the curves say so."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from convert import gguf_metadata
from minillm_jax.budget import allocate
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, layer_count, parameter_count, sizes_of
from minillm_jax.recipes.recipe import Recipe, with_options
from minillm_jax.recipes.used import used
from minillm_jax.report.summary import structures
from minillm_jax.stages import prune_model
from tests.budget.test_budget import small_model
from tests.helpers import logits_of, random_tokens

WINDOWS = random_tokens(61, 12, 16)
CALIBRATION = Calibration(Batches(WINDOWS), "random", 0)
SUBLAYERS = ("heads", "channels", "attention", "mlp")


def recipe_of(**options: object) -> Recipe:
    return used(*with_options(Recipe(), {"calibration": "given", **options})).recipe


def without_effect(model: Model, *matrices: tuple[int, str]) -> Model:
    """The model with output projections of zeros in some layers."""

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        for layer, name in matrices:
            if axis_table.array_path(path) == f"runs.0.{name}.kernel":
                array = array.at[layer].set(0.0)
        return array

    return replace(model, decoder=jax.tree_util.tree_map_with_path(leaf, model.decoder))


def test_a_layer_may_lose_all_groups_of_a_sublayer() -> None:
    decoder = small_model().decoder
    both = recipe_of(ratio=0.3, structures=SUBLAYERS).budget
    assert allocate.inventory_of(decoder, both.kinds, both).sizes("head", both)[0] == (0, 1, 2, 3, 4)
    whole = recipe_of(ratio=0.3, structures=("attention",)).budget
    assert allocate.inventory_of(decoder, whole.kinds, whole).sizes("head", whole)[0] == (0, 4)


@pytest.mark.parametrize("allocation", ["curves", "measured"])
def test_the_sublayer_without_effect_is_removed(allocation: str) -> None:
    model = without_effect(small_model(), (1, "attention.o"))
    recipe = recipe_of(ratio=0.33, structures=("attention",), allocation=allocation, ridge=0.01)
    pruned = prune_model(model, CALIBRATION, recipe)
    assert group_counts(pruned.decoder, "head") == [4, 0, 4]
    np.testing.assert_allclose(logits_of(pruned.decoder, WINDOWS), logits_of(model.decoder, WINDOWS), atol=1e-4)


def test_a_layer_without_both_sublayers_is_removed_and_the_limit_holds() -> None:
    model = without_effect(small_model(), (2, "attention.o"), (2, "mlp.down"))
    recipe = recipe_of(target_params=parameter_count(model.decoder) - 2112, structures=SUBLAYERS)
    pruned = prune_model(model, CALIBRATION, recipe)
    record = pruned.record or {}
    assert layer_count(pruned.decoder) == 2
    assert record["whole"]["layer"] == {"before": 3, "kept": [0, 1]}
    assert record["parameters_after"] == parameter_count(pruned.decoder) <= parameter_count(model.decoder) - 2112
    assert np.isfinite(logits_of(pruned.decoder, WINDOWS)).all()


def test_a_model_without_a_sublayer_can_be_pruned_again() -> None:
    model = without_effect(small_model(), (1, "attention.o"))
    recipe = recipe_of(ratio=0.33, structures=("attention",))
    once = prune_model(model, CALIBRATION, recipe)
    for options in ({"allocation": "uniform"}, {"structures": SUBLAYERS}, {"criterion": "wanda"}):
        twice = prune_model(once, CALIBRATION, recipe_of(ratio=0.3, **options))
        assert group_counts(twice.decoder, "head")[1] == 0
        assert parameter_count(twice.decoder) < parameter_count(once.decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "uniform"}, "takes the same share from every layer; use --budget curves or measured"),
        ({"format": "stock"}, "takes the same share from every layer"),
        ({"criterion": "wanda"}, "takes the same share from every layer"),
        ({"heads": "query"}, "which --heads query keeps"),
        ({"rounds": 2}, "at once; leave out --rounds"),
    ],
)
def test_settings_that_cannot_remove_sublayers_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe_of(ratio=0.3, structures=SUBLAYERS, **options)


def test_gguf_refuses_a_layer_without_a_sublayer() -> None:
    model = without_effect(small_model(), (1, "attention.o"))
    decoder = prune_model(model, CALIBRATION, recipe_of(ratio=0.33, structures=("attention",))).decoder
    with pytest.raises(InputError, match=r"layer 1 has lost its attention sublayer"):
        gguf_metadata.arch_for(decoder.config, sizes_of(decoder))


def test_the_report_names_removed_sublayers() -> None:
    groups = {"head": {"before": [4, 4], "after": [4, 0]}, "channel": {"before": [8, 8], "after": [8, 8]}}
    summary = {"whole": {}, "groups": groups, "settings": {"structures": list(SUBLAYERS)}}
    assert structures(summary) == "attention heads and attention sublayers"
