"""Makes JAX strict and quick to compile, checks array shapes at every call, and keeps tests off the network."""

import os
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Takes a quarter off compiling for the CPU. A version that does not know the flag would end the process over it.
if version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

from collections.abc import Iterator

import jax
import pytest
import torch
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(("minillm_jax", "convert"), "beartype.beartype")

# Two test processes on two cores: more threads would only wait for each other.
torch.set_num_threads(1)

# What these modules say holds for code as users compile it.
OPTIMISED = ("test_estimate", "test_directions", "test_memory", "test_real_models")


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Thousands of small programs are compiled once and run once: all but a few modules do without optimising them."""
    quick = request.module.__name__.split(".")[-1] not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
