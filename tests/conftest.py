"""Makes JAX strict, checks array shapes at every call, and keeps tests off the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(("minillm_jax", "convert"), "beartype.beartype")
