"""The choice of the step ε where losses or derivatives are not finite."""

import jax
import pytest
from jax import numpy as jnp

from minillm_jax.data.batches import Batches
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.scoring.gradient.settings import resolve
from minillm_jax.scoring.gradient.step import choose_epsilon
from minillm_jax.settings import Estimation
from tests.helpers import random_tokens, small_decoder


def test_a_derivative_that_is_not_finite_is_no_fault_of_the_step() -> None:
    """The way out is another type, not forward mode, whose derivative is the one that is not finite."""

    def leaf(path: jax.tree_util.KeyPath, array: jax.Array) -> jax.Array:
        broken = axis_table.array_path(path).endswith("mlp.down.kernel")
        return array.at[1].set(jnp.nan) if broken else array

    decoder = jax.tree_util.tree_map_with_path(leaf, small_decoder(layers=2))
    words = "the derivative of the loss along a direction is not finite, so no step can be compared .* --dtype float32"
    with pytest.raises(InputError, match=words):
        choose_epsilon(decoder, Batches(random_tokens(61, 4, 9)), resolve(Estimation(epsilon=None)))
