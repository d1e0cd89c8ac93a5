"""Small models for the tests: random Hugging Face folders, their PyTorch twins, and real ones where they exist."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from jax import numpy as jnp

from minillm_jax.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.decoder import Decoder, build, initialise
from minillm_jax.layers import Rope

SHARED = Path(__file__).parents[2] / "shared"

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def shared(path: str) -> Path:
    """A real model or text beside the checkout; the test skips where there is none."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs the real {path}, which is not part of the repository")
    return found


def torch_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A PyTorch model with every parameter randomised, norms and biases included."""
    config = transformers.AutoConfig.for_model(family, **SMALL | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            scale = 0.4 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            centre = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean=centre, std=scale)
    return model


def hugging_face_folder(path: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face folder with random weights."""
    torch_model(family, seed, **changes).save_pretrained(path)
    return path


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits by PyTorch, float32."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, dtype=np.int64))).logits.numpy()


def load_torch(folder: Path) -> Any:
    """A folder as stock transformers loads it, without remote code; every weight must be found in it."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()


def random_tokens(vocabulary: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def small_decoder(
    seed: int = 0, layers: int = 3, deviation: float = 0.3, sizes: Sizes | None = None, **changes: Any
) -> Decoder:
    """A random decoder without any file."""
    config = DecoderConfig(**{"family": "llama", "norm_epsilon": 1e-5, "rope": Rope(10000.0)} | changes)
    sizes = sizes or Sizes(V=61, D=16, H=4, layers=(LayerSizes(N=8, K=4, F=12),) * layers)
    decoder = initialise(build(config, sizes), jax.random.key(seed), deviation)
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(decoder))))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), decoder)


def arrays_equal(left: Any, right: Any) -> bool:
    """Whether two trees hold the same arrays, bit for bit."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.array_equal(a, b)), left, right)
    return all(jax.tree.leaves(same))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
