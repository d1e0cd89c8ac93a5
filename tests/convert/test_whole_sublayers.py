"""Models that have lost whole sublayers: every format that holds them keeps their outputs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, sizes_of
from minillm_jax.pruning.slicing import slice_groups, slice_sizes
from tests.helpers import (
    SMALL,
    arrays_equal,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 40)


def halved(model: Model) -> Model:
    """The model without the attention of its first layer, the MLP of its second, and both of its third."""
    counts = {kind: group_counts(model.decoder, kind) for kind in ("head", "channel")}
    kept = {
        "head": [np.arange(0), np.arange(1, counts["head"][1]), np.arange(0)],
        "channel": [np.arange(2, counts["channel"][0]), np.arange(0), np.arange(0)],
    }
    assert slice_sizes(sizes_of(model.decoder), kept) == sizes_of(slice_groups(model.decoder, kept))
    return dataclasses.replace(model, decoder=slice_groups(model.decoder, kept))


@pytest.mark.parametrize("family", quickly(SMALL))
def test_outputs_are_the_same_in_every_format_that_holds_them(tmp_path: Path, family: str) -> None:
    model = halved(read_model(hugging_face_folder(tmp_path / "dense", family)))
    expected = logits_of(model.decoder, TOKENS)
    assert np.isfinite(expected).all()
    padded = () if model.decoder.config.joint_qk_norm else ("padded",)
    for name in (None, *padded, "flax"):
        folder = tmp_path / str(name)
        write_model(model, folder, name)
        again = read_model(folder)
        np.testing.assert_allclose(logits_of(again.decoder, TOKENS), expected, atol=1e-5)
        if name != "padded":
            assert arrays_equal(again.decoder, model.decoder)
        if name is None:
            np.testing.assert_allclose(torch_logits(load_torch(folder), TOKENS), expected, atol=1e-4)
        if name == "padded":
            np.testing.assert_allclose(torch_logits(load_stock(folder), TOKENS), expected, atol=1e-4)
