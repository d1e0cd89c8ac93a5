"""Activation norms of every input feature, against norms of the inputs of PyTorch's modules."""

from pathlib import Path

import numpy as np
import pytest
import torch

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.model import axis_table
from minillm_jax.scoring.activations import activation_norms
from minillm_jax.settings import ACTIVATION_NORMS
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
    model, windows, recorded = load_torch(folder), random_tokens(97, 4, 15), {}
    for layer in range(3):
        for name, path in MODULES.items():
            module = model.get_submodule(f"model.layers.{layer}.{path}")
            key = (name, layer)
            module.register_forward_pre_hook(lambda _, x, key=key: recorded.__setitem__(key, x[0].flatten(0, 1)))
    with torch.no_grad():
        model(torch.from_numpy(windows.astype(np.int64)))
    reference = {
        "l2": lambda x: x.norm(dim=0),
        "rms": lambda x: x.square().mean(dim=0).sqrt(),
        "std": lambda x: x.std(dim=0),
        "mean-abs": lambda x: x.abs().mean(dim=0),
        "none": lambda x: torch.ones(x.shape[1]),
    }[norm]
    (norms,) = activation_norms(read_model(folder).decoder, Batches(windows), norm)
    assert norms.keys() == axis_table.matrices().keys() == MODULES.keys()
    for (name, layer), inputs in recorded.items():
        np.testing.assert_allclose(norms[name][layer].ravel(), reference(inputs).numpy(), rtol=1e-4, err_msg=name)


def test_norms_have_the_input_axes_of_their_matrix_and_do_not_depend_on_batches() -> None:
    decoder, windows = small_decoder(), random_tokens(61, 5, 9)
    (reference,) = activation_norms(decoder, Batches(windows))
    for name, axes in axis_table.matrices().items():
        assert reference[name].ndim == 1 + len(axes.split()[0])
    in_small_batches = Batches(windows, tokens_per_batch=18)
    assert len(in_small_batches) == 3
    (norms,) = activation_norms(decoder, in_small_batches)
    for name, expected in reference.items():
        np.testing.assert_allclose(norms[name], expected, rtol=1e-6)
