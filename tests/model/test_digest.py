"""The hash of a model: every bit of every weight counts, and its place."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from minillm_jax.model.digest import array_hash, model_digest
from tests.helpers import small_decoder


def words(array: np.ndarray) -> list[int]:
    return np.asarray(array_hash(jnp.asarray(array))).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_every_entry_and_its_place_count(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    others = [array.copy() for _ in range(4)]
    others[0][1, 2, 3] += 1
    others[1][0, 0] = array[0, 0, ::-1]
    others[2][:] = array[::-1]
    others[3][0, 1, 2], others[3][1, 0, 0] = array[1, 0, 0], array[0, 1, 2]
    hashes = [tuple(words(other)) for other in (array, *others)]
    assert len(set(hashes)) == len(hashes)
    assert words(array) == words(array.copy())


def test_the_sign_of_a_zero_counts() -> None:
    assert words(np.zeros(3, np.float32)) != words(-np.zeros(3, np.float32))


def test_a_model_is_known_by_its_configuration_and_its_weights() -> None:
    decoder = small_decoder()
    assert model_digest(decoder) == model_digest(small_decoder())
    assert model_digest(decoder) != model_digest(small_decoder(post_norms=True))
    changed = jax.tree.map(lambda array: array, decoder)
    scale = changed.runs[0].mlp_norm.scale
    scale.set_value(scale[...].at[1, 3].add(1e-7))
    assert model_digest(decoder) != model_digest(changed)
