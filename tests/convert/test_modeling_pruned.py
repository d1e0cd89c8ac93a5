"""The remote code of pruned models: each family must equal its dense model with the same heads and channels zeroed."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from convert import modeling_pruned
from tests.helpers import JOINT_NORMS, edit_json, quickly

HEAD_SIZE, CHANNELS, HIDDEN = 8, 24, 40
SIZES = {
    "vocab_size": 97,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 4,
    "intermediate_size": CHANNELS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 96,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": HEAD_SIZE}
PLAIN = SIZES | {"num_attention_heads": 5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 5}),
    "ministral3": ("Ministral3", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "gemma": ("Gemma", GROUPED),
    "gemma2": ("Gemma2", GROUPED | {"sliding_window": 5, "query_pre_attn_scalar": HEAD_SIZE}),
    "gemma3_text": (
        "Gemma3",
        GROUPED | {"sliding_window": 5, "query_pre_attn_scalar": HEAD_SIZE, "sliding_window_pattern": 2},
    ),
    "glm": ("Glm", GROUPED),
    "glm4": ("Glm4", GROUPED),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", GROUPED | {"sliding_window": 7}),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED | {"sliding_window": 5}),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layer_interval": 2}),
    "granite": ("Granite", GROUPED | {"residual_multiplier": 0.7, "attention_multiplier": 0.4}),
    "exaone4": ("Exaone4", GROUPED | {"sliding_window": 5, "sliding_window_pattern": 2}),
    "cohere2": ("Cohere2", GROUPED | {"sliding_window": 5, "sliding_window_pattern": 2}),
    "seed_oss": ("SeedOss", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED | {"sliding_window": 5}),
    "stablelm": ("StableLm", PLAIN | {"num_key_value_heads": 5}),
    "opt": ("OPT", PLAIN | {"ffn_dim": CHANNELS, "dropout": 0.0}),
    "bloom": ("Bloom", PLAIN),
    "gpt_neox": ("GPTNeoX", PLAIN),
}
# Kept key/value heads and kept number of channels of each layer; None keeps all channels. The first layer has lost its
# attention sublayer, the last one its MLP.
KEPT: tuple[tuple[list[int], int | None], ...] = (([], 17), ([0, 2, 4], 17), ([0, 1, 2, 3, 4], None), ([3], 0))


@dataclass(frozen=True)
class Case:
    """A folder with a pruned model, and the dense model with the same outputs."""

    family: str
    dense: Any
    folder: Path

    def load(self, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
        return load(self.folder, auto, **options)


def load(folder: Path, auto: Any = AutoModelForCausalLM, trust: bool = True, **options: Any) -> Any:
    """Load a model from a folder, which must hold exactly its weights."""
    options = {"dtype": torch.float32} | options
    model, loading_info = auto.from_pretrained(folder, trust_remote_code=trust, output_loading_info=True, **options)
    if auto is AutoModel:
        loading_info["unexpected_keys"] -= {"lm_head.weight", "lm_head.bias"}
    assert not any(loading_info.values()), loading_info
    return model.eval()


def randomise(model: Any) -> Any:
    """Fill all parameters with random values, biases and norms included."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=scale)
    return model.eval()


def dense_model(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **FAMILIES[family][1] | changes)
    return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def entries(groups: list[int], size: int) -> torch.Tensor:
    """Row indices of the given groups, where each group has `size` rows."""
    return (torch.tensor(groups, dtype=torch.long)[:, None] * size + torch.arange(size)).flatten()


def kept_groups(family: str, layer: int) -> list[int]:
    """The key/value heads that a layer keeps: all or none where the norms of the others would change."""
    groups = KEPT[layer][0]
    return [*range(5)] if groups and family in JOINT_NORMS else groups


def kept_entries(config: Any, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Name of a linear map → kept rows, and name of a linear map → kept columns."""
    groups, count = kept_groups(config.model_type, layer), KEPT[layer][1]
    channels = channels_of(config)
    c = torch.arange(channels) if count is None else torch.randperm(channels)[:count].sort().values
    n, k = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    q, kv = entries(groups, n // k * HEAD_SIZE), entries(groups, HEAD_SIZE)
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "query_key_value": entries(groups, 3 * HEAD_SIZE)}
    rows["qkv_proj"] = torch.cat([q, n * HEAD_SIZE + kv, (n + k) * HEAD_SIZE + kv])
    rows["gate_up_proj"] = torch.cat([c, channels + c])
    rows |= {"q_norm": q, "k_norm": kv} if config.model_type in JOINT_NORMS else {}
    rows |= dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h"), c)
    columns = dict.fromkeys(("o_proj", "out_proj", "dense"), q)
    return rows, columns | dict.fromkeys(("down_proj", "fc2", "c_proj", "dense_4h_to_h"), c)


def channels_of(config: Any) -> int:
    return 4 * HIDDEN if config.model_type == "bloom" else CHANNELS


def prune(dense: Any) -> dict[str, torch.Tensor]:
    """Return the sliced tensors of a model, and zero the removed heads and channels in the model itself."""
    torch.manual_seed(1)
    kept = [kept_entries(dense.config, layer) for layer in range(len(KEPT))]
    tensors = {}
    for name, tensor in dense.state_dict().items():
        layer, linear = re.search(r"\.(?:layers|h)\.(\d+)\.", name), name.split(".")[-2]
        rows, columns = kept[int(layer[1])] if layer else ({}, {})
        tensors[name] = tensor.clone()
        if linear in rows:
            tensors[name] = tensor[rows[linear]].clone()
        elif linear in columns and tensor.ndim == 2:
            tensors[name] = tensor[:, columns[linear]].clone()
            removed = torch.ones(tensor.shape[1], dtype=torch.bool)
            removed[columns[linear]] = False
            tensor[:, removed] = 0
    if dense.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def pruned_config(dense: Any, **changes: Any) -> dict[str, Any]:
    """The config.json of a pruned model with the sizes of a dense model."""
    family, stem = dense.config.model_type, FAMILIES[dense.config.model_type][0]
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return dense.config.to_dict() | {
        "model_type": f"pruned_{family}",
        "architectures": [f"Pruned{stem}ForCausalLM"],
        "auto_map": {auto: f"modeling_pruned.Pruned{stem}{kind}" for auto, kind in names.items()},
        "head_dim": HEAD_SIZE,
        **changes,
    }


def per_layer_config(config: Any) -> dict[str, dict[str, Any]]:
    """Number of a layer → its sizes that differ from the dense model's."""
    family = config.model_type
    heads = "n_head" if family == "bloom" else "num_attention_heads"
    layers: dict[str, dict[str, Any]] = {}
    for layer, (_, channels) in enumerate(KEPT):
        groups = kept_groups(family, layer)
        sizes: dict[str, Any] = {}
        if channels is not None:
            sizes["ffn_dim" if family == "opt" else "intermediate_size"] = channels
        if len(groups) < 5:
            sizes[heads] = len(groups)
            if hasattr(config, "num_key_value_heads"):
                sizes |= {
                    heads: config.num_attention_heads // 5 * len(groups),
                    "num_key_value_heads": len(groups),
                }
        if family == "bloom":
            sizes["alibi_heads"] = groups
        if sizes:
            layers[str(layer)] = sizes
    return layers


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(modeling_pruned.__file__, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _separate_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Remote code is copied to a temporary folder instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", sys.path.copy())
        yield


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """A second thread slows down models of this size."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in cache:
            dense = dense_model(family)
            tensors = prune(dense)
            changes = {"per_layer_config": per_layer_config(dense.config)}
            if family == "bloom":
                changes["intermediate_size"] = channels_of(dense.config)
            folder = tmp_path_factory.mktemp(family) / "pruned"
            write_folder(folder, tensors, pruned_config(dense, **changes))
            cache[family] = Case(family, dense, folder)
        return cache[family]

    return case


# Families whose layers are built like those of another one here; they run with `make test-all`.
LIKE_OTHERS = ("ministral3", "phi", "olmo2", "smollm3", "granite", "exaone4", "seed_oss", "starcoder2", "stablelm")
QUICK = [family for family in FAMILIES if family not in LIKE_OTHERS]


@pytest.fixture(params=quickly(FAMILIES, QUICK))
def case(cases: Any, request: pytest.FixtureRequest) -> Case:
    return cases(request.param)


@contextmanager
def no_registrations() -> Iterator[None]:
    """Remove all registrations with the Auto classes, and restore them at the end of the block."""
    # transformers has no public function that removes a registration.
    mappings = (transformers.CONFIG_MAPPING, transformers.MODEL_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    registrations = [mapping._extra_content for mapping in mappings]
    for mapping in mappings:
        mapping._extra_content = {}
    yield
    for mapping, content in zip(mappings, registrations, strict=True):
        mapping._extra_content = content


@pytest.fixture(scope="module", autouse=True)
def _unregistered() -> Iterator[None]:
    """Other test modules of the same process may have called `register`."""
    with no_registrations():
        yield


@pytest.fixture
def registered() -> Iterator[None]:
    """Call `register`, twice because it must allow that, and remove the registrations after the test."""
    with no_registrations():
        modeling_pruned.register()
        modeling_pruned.register()
        yield


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(tokens(2, 12), **options).logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def generated(model: Any, **options: Any) -> list[list[int]]:
    prompt = tokens(2, 9)
    options |= {"attention_mask": torch.ones_like(prompt), "do_sample": False}
    return model.generate(prompt, max_new_tokens=8, min_new_tokens=8, **options).tolist()


def test_logits_equal_the_zeroed_dense_model(case: Case) -> None:
    assert_close(logits(case.load()), logits(case.dense))


def test_left_padding(case: Case) -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    actual, expected = (logits(model, attention_mask=mask)[mask == 1] for model in (case.load(), case.dense))
    assert_close(actual, expected)


def test_base_model(case: Case) -> None:
    model = case.load(AutoModel)
    with torch.no_grad():
        actual = model(tokens(2, 12)).last_hidden_state
        expected = case.dense.base_model(tokens(2, 12)).last_hidden_state
    assert type(model).__name__ == f"Pruned{FAMILIES[case.family][0]}Model"
    assert_close(actual, expected)


def test_configuration(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
    stored = json.loads((case.folder / "config.json").read_text())
    assert config.model_type == f"pruned_{case.family}"
    assert isinstance(config, type(case.dense.config))
    assert config.to_dict()["per_layer_config"] == stored["per_layer_config"]
    counts = [layer.num_attention_heads for layer in config.per_layer_config]
    heads = [len(kept_groups(case.family, layer)) for layer in range(len(KEPT))]
    assert counts == [count * case.dense.config.num_attention_heads // 5 for count in heads]
    with pytest.raises(RuntimeError, match="may vary across layers"):
        _ = config.num_attention_heads


def test_generate(case: Case) -> None:
    model, expected = case.load(), generated(case.dense)
    assert generated(model) == expected
    assert generated(model, cache_implementation="static") == expected


def test_base_model_shares_the_configuration(case: Case) -> None:
    model = case.load()
    assert model.base_model.config is model.config
    assert model.config.num_hidden_layers == 4


def test_model_can_be_pickled(case: Case, tmp_path: Path) -> None:
    torch.save(case.load(), tmp_path / "model.pt")
    assert_close(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(case.dense))


@pytest.mark.parametrize(
    "family", quickly(sorted(set(FAMILIES) - {"bloom"}), QUICK)
)  # BLOOM has only one implementation
def test_set_attn_implementation(cases: Any, family: str) -> None:
    model = copy.deepcopy(cases(family).load())
    default = "eager" if family == "gemma2" else "sdpa"
    assert model.config._attn_implementation == default
    model.set_attn_implementation("eager")
    attentions = model(tokens(2, 12), output_attentions=True).attentions
    heads = [layer.num_attention_heads for layer in model.config.per_layer_config]
    assert [attention.shape[1] for attention in attentions] == heads
    assert_close(logits(model), logits(cases(family).dense))


def test_save_pretrained_keeps_code_configuration_and_weights(case: Case, tmp_path: Path) -> None:
    case.load().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_pruned.py").read_text() == Path(modeling_pruned.__file__).read_text()
    original, saved = (json.loads((path / "config.json").read_text()) for path in (case.folder, tmp_path / "saved"))
    keys = ("model_type", "architectures", "auto_map", "head_dim", "per_layer_config")
    assert {key: original[key] for key in keys} == {key: saved[key] for key in keys}
    assert_close(logits(load(tmp_path / "saved")), logits(case.dense))


@pytest.mark.usefixtures("registered")
def test_registered_classes_load_without_remote_code(case: Case, tmp_path: Path) -> None:
    model = case.load(trust=False)
    stem = FAMILIES[case.family][0]
    assert type(model) is getattr(modeling_pruned, f"Pruned{stem}ForCausalLM")
    assert type(case.load(AutoModel, trust=False)) is getattr(modeling_pruned, f"Pruned{stem}Model")
    assert_close(logits(model), logits(case.dense))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_pruned.py").exists()
    assert_close(logits(load(tmp_path / "saved", trust=False)), logits(case.dense))


def test_classes_load_with_from_pretrained(case: Case, tmp_path: Path) -> None:
    model = load(case.folder, getattr(modeling_pruned, f"Pruned{FAMILIES[case.family][0]}ForCausalLM"))
    assert_close(logits(model), logits(case.dense))
    model.config.auto_map = None
    model.save_pretrained(tmp_path / "saved")
    assert_close(logits(load(tmp_path / "saved")), logits(case.dense))


def test_stock_classes_refuse_pruned_models(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        case.load(trust=False)
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    edit_json(folder / "config.json", auto_map=None)
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        load(folder)


@pytest.mark.parametrize("family", quickly(FAMILIES, QUICK))
def test_pruned_hidden_size(family: str, tmp_path: Path) -> None:
    """A model of hidden size D equals a model of hidden size 2D with duplicated entries: norm statistics are equal."""
    dense = dense_model(family)
    changes: dict[str, Any] = {"hidden_size": HIDDEN // 2, "intermediate_size": channels_of(dense.config)}
    changes |= {"word_embed_proj_dim": HIDDEN // 2} if family == "opt" else {}
    changes |= {"embedding_scale": HIDDEN**0.5} if "gemma" in family else {}
    config_class = getattr(modeling_pruned, f"Pruned{FAMILIES[family][0]}Config")
    config = config_class(**pruned_config(dense, **changes))
    model = randomise(getattr(modeling_pruned, f"Pruned{FAMILIES[family][0]}ForCausalLM")(config))

    def duplicated(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == HIDDEN // 2:
            return torch.cat([tensor, tensor])
        if tensor.ndim == 2 and tensor.shape[1] == HIDDEN // 2:
            return torch.cat([tensor, tensor], 1) / (1 if "embed" in name else 2)
        return tensor

    def hidden_states(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.base_model(tokens(2, 12)).last_hidden_state

    state = model.base_model.state_dict()
    dense.base_model.load_state_dict({name: duplicated(name, tensor) for name, tensor in state.items()})
    assert_close(torch.cat([hidden_states(model)] * 2, -1), hidden_states(dense), 1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert_close(hidden_states(load(tmp_path / "saved")), hidden_states(model))


@pytest.mark.parametrize("family", quickly(FAMILIES, QUICK))
def test_configuration_accepts_heads_that_do_not_divide_the_hidden_size(family: str, tmp_path: Path) -> None:
    config_class = getattr(modeling_pruned, f"Pruned{FAMILIES[family][0]}Config")
    config = config_class(**pruned_config(dense_model(family), hidden_size=23))
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).hidden_size == 23


def test_from_config_initialises_the_weights(case: Case) -> None:
    config = AutoConfig.from_pretrained(case.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    shapes, loaded_shapes = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, case.load()))
    assert shapes == loaded_shapes
    deviation = config.init_std if case.family == "opt" else config.initializer_range
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel():
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.25)
            assert module.bias is None or not module.bias.any()


def test_tied_embeddings_stay_tied(case: Case) -> None:
    model = case.load()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == case.dense.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_bfloat16(cases: Any, family: str) -> None:
    model = cases(family).load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    actual, expected = logits(model).float(), logits(cases(family).dense)
    assert actual.isfinite().all()
    assert (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # adapters of the removed sublayers
def test_lora(cases: Any, family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(cases(family).load(), options)
    optimizer = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(tokens(2, 12), labels=tokens(2, 12)).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning"
)  # the only name that all supported versions have
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_gradient_checkpointing_keeps_the_gradients(cases: Any, family: str) -> None:
    model = cases(family).load().train()
    expected = torch.autograd.grad(model(tokens(2, 12), labels=tokens(2, 12)).loss, model.get_input_embeddings().weight)
    model.gradient_checkpointing_enable()
    actual = torch.autograd.grad(model(tokens(2, 12), labels=tokens(2, 12)).loss, model.get_input_embeddings().weight)
    assert_close(actual[0], expected[0])


def test_dynamic_rope_reads_global_sizes_in_the_forward_pass(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    dense = dense_model("llama", rope_parameters=rope, max_position_embeddings=8)
    tensors, layers = prune(dense), per_layer_config(dense.config)
    folder = write_folder(tmp_path / "pruned", tensors, pruned_config(dense, per_layer_config=layers))
    assert_close(logits(load(folder)), logits(dense))


def test_phi3_long_rope(tmp_path: Path) -> None:
    factors = [1.0 + index for index in range(HEAD_SIZE // 2)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors[::-1]}
    rope |= {"factor": 2.0, "original_max_position_embeddings": 32}
    dense = dense_model("phi3", rope_parameters=rope, num_attention_heads=5)
    tensors, layers = prune(dense), per_layer_config(dense.config)
    for sizes in layers.values():
        sizes["num_attention_heads"] = sizes["num_key_value_heads"]
    folder = write_folder(tmp_path / "pruned", tensors, pruned_config(dense, per_layer_config=layers))
    assert_close(logits(load(folder)), logits(dense))
    edit_json(folder / "config.json", hidden_size=23)  # the number of factors depends on the head size only
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 23


def test_import_loads_no_model_code_and_no_jax() -> None:
    code = (
        "import sys, convert.modeling_pruned\n"
        "assert not [name for name in sys.modules if '.modeling_llama' in name or '.modeling_bloom' in name]\n"
        "assert not {'jax', 'minillm_jax', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_unknown_class_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="PrunedGPT2Config"):
        _ = modeling_pruned.PrunedGPT2Config
