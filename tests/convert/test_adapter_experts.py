"""Adapters of the experts in the form of PEFT: it computes what we compute, and its own adapters are read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from jax import numpy as jnp
from safetensors.numpy import load_file

from convert.adapter import WEIGHTS, read_adapter, write_adapter
from convert.adapter_config import CONFIG
from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.recovery.adapter import Adapter, Lora, initial, merge
from minillm_jax.recovery.trained import TrainedAdapter
from tests.convert.test_mixture_formats import unequal
from tests.helpers import (
    MIXTURES,
    arrays_equal,
    hugging_face_folder,
    load_stock,
    load_torch,
    logits_of,
    quickly,
    random_tokens,
    torch_logits,
)

TOKENS = random_tokens(97, 2, 12)
LORA = Lora(rank=3, alpha=5.0, dropout=0.1)
# Gate and up apart with a shared expert and a dense layer, and gate and up that alternate.
QUICK = ("qwen2_moe", "gpt_oss")
# Family and format where layers are unequal. Heads of zeros would change OLMoE's norms, so it is never padded.
UNEQUAL = [f"{family}, {name}" for family in MIXTURES for name in ("per-layer", "padded")]
UNEQUAL.remove("olmoe, padded")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # PEFT calls it
    # PEFT looks for the names of parameters among those of modules, and takes the rank and α nevertheless.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def random_adapter(decoder: Decoder, lora: Lora = LORA) -> Adapter:
    """An adapter of which both factors are random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial(decoder, lora, 0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def written(folder: Path, adapter: Adapter, lora: Lora, decoder: Decoder, base: Path) -> Path:
    folder.mkdir()
    write_adapter(adapter, lora, decoder, folder, str(base))
    return folder


def with_peft(model_folder: Path, adapter_folder: Path) -> Any:
    """PEFT's model, with a check that it takes exactly the tensors of the adapter's folder."""
    model = peft.PeftModel.from_pretrained(load_stock(model_folder), str(adapter_folder)).eval()
    taken = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()}
    assert taken == {name: tensor.shape for name, tensor in load_file(adapter_folder / WEIGHTS).items()}
    return model


@pytest.mark.parametrize("family", quickly(MIXTURES, QUICK))
def test_peft_computes_what_we_compute(tmp_path: Path, family: str) -> None:
    """With the adapter beside the model, and with the merged folder; and the adapter is read again."""
    folder = hugging_face_folder(tmp_path / "model", family)
    model = read_model(folder)
    adapter = random_adapter(model.decoder)
    assert sum(name.startswith("experts.") for name in adapter[-1]) == 3
    adapter_folder = written(tmp_path / "adapter", adapter, LORA, model.decoder, folder)
    merged = dataclasses.replace(model, decoder=merge(model.decoder, adapter, LORA))
    expected = logits_of(merged.decoder, TOKENS)
    np.testing.assert_allclose(torch_logits(with_peft(folder, adapter_folder), TOKENS), expected, atol=1e-4)
    assert np.abs(expected - logits_of(model.decoder, TOKENS)).max() > 0.1
    assert write_model(merged, tmp_path / "merged").format == "stock"
    np.testing.assert_allclose(torch_logits(load_stock(tmp_path / "merged"), TOKENS), expected, atol=1e-4)
    again, lora = read_adapter(adapter_folder, model.decoder)
    assert arrays_equal(again, adapter)
    present = tuple(name for name in axis_table.all_matrices() if any(name in run for run in adapter))
    assert lora == dataclasses.replace(LORA, targets=present, dropout=0.0)


@pytest.mark.parametrize("case", quickly(UNEQUAL, ("glm4_moe, per-layer",)))
def test_peft_computes_what_we_compute_in_unequal_layers(tmp_path: Path, case: str) -> None:
    family, name = case.split(", ")
    small = unequal(read_model(hugging_face_folder(tmp_path / "dense", family)), experts=name == "per-layer")
    write_model(small, tmp_path / "small", name)
    model = read_model(tmp_path / "small")
    adapter = random_adapter(model.decoder)
    adapter_folder = written(tmp_path / "adapter", adapter, LORA, model.decoder, tmp_path / "small")
    adapted = peft.PeftModel.from_pretrained(load_torch(tmp_path / "small"), str(adapter_folder)).eval()
    expected = logits_of(merge(model.decoder, adapter, LORA), TOKENS)
    np.testing.assert_allclose(torch_logits(adapted, TOKENS), expected, atol=1e-4)


@pytest.mark.parametrize("targets", [("experts.up",), ("experts.down", "attention.q")])
def test_peft_computes_what_we_compute_where_some_matrices_are_adapted(
    tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """The layers compute with the factors beside the weights here, not with merged ones."""
    folder, lora = hugging_face_folder(tmp_path / "model", "gpt_oss"), dataclasses.replace(LORA, targets=targets)
    decoder = read_model(folder).decoder
    adapter = random_adapter(decoder, lora)
    assert [set(run) for run in adapter] == [set(targets)]
    model = with_peft(folder, written(tmp_path / "adapter", adapter, lora, decoder, folder))
    trained = TrainedAdapter(lora)
    hidden = jax.jit(lambda adapter, decoder: trained.hidden(adapter, decoder, jnp.asarray(TOKENS), None))
    with torch.no_grad():
        expected = model.base_model.model.model(torch.from_numpy(TOKENS.astype(np.int64))).last_hidden_state.numpy()
    np.testing.assert_allclose(hidden(adapter, decoder), expected, atol=1e-4)
    assert arrays_equal(read_adapter(tmp_path / "adapter", decoder)[0], adapter)


def peft_adapter(folder: Path, base: Path, **settings: Any) -> Any:
    """An adapter as PEFT trains and saves it, with random factors; returns PEFT's model."""
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(load_stock(base), peft.LoraConfig(**options)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def test_adapters_of_peft_are_read(tmp_path: Path) -> None:
    """Gate and up share the A of their parameter; one parameter has another rank, and one another α."""
    base = hugging_face_folder(tmp_path / "model", "qwen2_moe")
    settings = {
        "target_modules": ["q_proj", "shared_expert.gate_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "shared_expert.up_proj.weight"],
        "rank_pattern": {"experts.down_proj": 2, "shared_expert.gate_proj": 3},
        "alpha_pattern": {"gate_up_proj": 3},
    }
    model = peft_adapter(tmp_path / "adapter", base, **settings)
    decoder = read_model(base).decoder
    adapter, lora = read_adapter(tmp_path / "adapter", decoder)
    assert lora.targets == ("attention.q", "mlp.gate", "mlp.up", "experts.gate", "experts.up", "experts.down")
    np.testing.assert_array_equal(adapter[-1]["experts.gate"].a, adapter[-1]["experts.up"].a)
    expected = torch_logits(model, TOKENS)
    np.testing.assert_allclose(logits_of(merge(decoder, adapter, lora), TOKENS), expected, atol=1e-4)
    assert np.abs(expected - logits_of(decoder, TOKENS)).max() > 0.1


def test_settings_name_the_parameters_of_experts_and_shared_experts(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", "glm4_moe")
    decoder = read_model(folder).decoder
    adapter_folder = written(tmp_path / "adapter", random_adapter(decoder), LORA, decoder, folder)
    config = json.loads((adapter_folder / CONFIG).read_text())
    assert config["target_modules"] == [f"self_attn.{name}_proj" for name in "koqv"]
    dense = [f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    shared = [f"mlp.shared_experts.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert set(config["target_parameters"]) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj", *dense, *shared}
    assert (config["rank_pattern"], config["alpha_pattern"]) == (
        {"mlp.experts.gate_up_proj": 6},
        {"mlp.experts.gate_up_proj": 10},
    )
    assert config["lora_dropout"] == 0
    # Without them, PEFT takes dropout.
    lora = dataclasses.replace(LORA, targets=("attention.q",))
    written(tmp_path / "attention", random_adapter(decoder, lora), lora, decoder, folder)
    config = json.loads((tmp_path / "attention" / CONFIG).read_text())
    assert config["lora_dropout"] == 0.1
    assert "target_parameters" not in config


def test_an_adapter_of_a_router_is_refused(tmp_path: Path) -> None:
    base = hugging_face_folder(tmp_path / "model", "mixtral")
    peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    with pytest.raises(InputError, match=r"belongs to a router, .* merge it with PEFT"):
        read_adapter(tmp_path / "adapter", read_model(base).decoder)
