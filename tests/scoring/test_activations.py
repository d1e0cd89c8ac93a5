"""Activation norms of every input feature, against what PyTorch's modules see."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.model import axis_table
from minillm_jax.scoring import activations
from minillm_jax.scoring.activations import ACTIVATION_NORMS, activation_norms
from tests.helpers import hugging_face_folder, load_torch, random_tokens, small_decoder

MODULES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.mark.parametrize("norm", ACTIVATION_NORMS)
def test_norms_equal_those_of_the_inputs_in_pytorch(tmp_path: Path, norm: str) -> None:
    folder = hugging_face_folder(tmp_path / "model")
    model, windows, seen = load_torch(folder), random_tokens(97, 4, 15), {}
    for layer in range(3):
        for name, path in MODULES.items():
            module = model.get_submodule(f"model.layers.{layer}.{path}")
            key = (name, layer)
            module.register_forward_pre_hook(lambda _, x, key=key: seen.__setitem__(key, x[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    reference = {
        "l2": lambda x: x.norm(dim=0),
        "rms": lambda x: x.square().mean(dim=0).sqrt(),
        "std": lambda x: x.std(dim=0),
        "mean-abs": lambda x: x.abs().mean(dim=0),
        "none": lambda x: torch.ones(x.shape[1]),
    }[norm]
    (found,) = activation_norms(read_model(folder).decoder, windows, norm)
    assert found.keys() == axis_table.matrices().keys() == MODULES.keys()
    for (name, layer), inputs in seen.items():
        np.testing.assert_allclose(found[name][layer].ravel(), reference(inputs).numpy(), rtol=1e-4, err_msg=name)


def test_norms_have_the_input_axes_of_their_matrix_and_do_not_depend_on_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, windows = small_decoder(), random_tokens(61, 5, 9)
    (whole,) = activation_norms(decoder, windows)
    for name, axes in axis_table.matrices().items():
        assert whole[name].ndim == 1 + len(axes.split()[0])
    monkeypatch.setattr(activations, "batches", lambda windows, devices: Batches(windows, 18, devices))
    (split,) = activation_norms(decoder, windows)
    for name, norms in whole.items():
        np.testing.assert_allclose(split[name], norms, rtol=1e-6)
