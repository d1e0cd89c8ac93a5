"""Decoders built from a configuration and sizes: abstract, with random weights, or with new layers."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, DTypeLike

from minillm_jax.model import axis_table
from minillm_jax.model.config import DecoderConfig, LayerSizes, Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import MLP, Attention, Block, Experts, Linear, Norm

# The window of a layer without a sliding window, in a model with windows: longer than every sequence.
NO_WINDOW = np.iinfo(np.int32).max


def with_runs(decoder: Decoder, runs: Sequence[Block]) -> Decoder:
    """A decoder with new layers; all other arrays are shared with the original."""
    return Decoder(decoder.config, decoder.embedding[...], runs, **optional_parts(decoder))


def optional_parts(decoder: Decoder) -> dict[str, Any]:
    """The arrays and modules outside the layers that some decoders lack, as `Decoder` takes them."""
    position = decoder.position_embedding
    names = ("final_norm", "head", "embedding_norm", "project_in", "project_out")
    parts = {name: getattr(decoder, name) for name in names}
    return parts | {"position_embedding": None if position is None else position[...]}


def without_layers(decoder: Decoder) -> Decoder:
    """A decoder with one run of no layers, which embeds tokens and projects to the vocabulary.

    It is a small argument for programs that take one layer after the other. It keeps the shapes of a layer.
    """
    shapes = decoder.runs[0]
    empty = jax.tree.map(lambda array: np.zeros((0, *array.shape[1:]), array.dtype), shapes)
    return with_runs(decoder, [empty])


def build(config: DecoderConfig, sizes: Sizes, dtype: DTypeLike = jnp.float32) -> Decoder:
    """An abstract decoder: its leaves are `jax.ShapeDtypeStruct`, and data of the layers are NumPy arrays.

    Args:
      config: how the decoder computes.
      sizes: the sizes of all arrays, and the data of the layers (windows, slopes).
      dtype: type of all parameters.

    Example:
      >>> abstract = build(config, sizes)
      >>> decoder = initialise(abstract, jax.random.key(0))
    """
    letters = {"V": sizes.V, "D": sizes.D, "H": sizes.H, "E": sizes.E or sizes.D, "M": sizes.M}

    def leaves(table: Mapping[str, str], letters: dict[str, int], *stack: int) -> dict[str, Any]:
        return {
            path: jax.ShapeDtypeStruct((*stack, *axis_table.shape(axes, letters)), dtype)
            for path, axes in table.items()
            if config.has_array(path)
        }

    runs = []
    for shape, equal in groupby(sizes.layers, lambda layer: {letter: getattr(layer, letter) for letter in "NKFXW"}):
        run = list(equal)
        arrays = leaves(axis_table.BLOCK_AXES, letters | shape | {"1": min(shape["X"], 1)}, len(run))
        runs.append(_build_block(arrays | _layer_data(config, run), config))
    return assemble(config, leaves(axis_table.OUTER_AXES, letters), runs)


def _layer_data(config: DecoderConfig, run: Sequence[LayerSizes]) -> dict[str, np.ndarray]:
    """Windows, slopes and rotary positions of the layers of a run, stacked, if the configuration has them."""
    data: dict[str, np.ndarray] = {}
    if config.windowed:
        data["attention.window"] = np.asarray([layer.window or NO_WINDOW for layer in run], np.int32)
    if config.alibi_heads is not None:
        data["attention.slopes"] = np.asarray([layer.slopes for layer in run], np.float32)
    if config.other_rope is not None:
        data["attention.rope"] = np.asarray([layer.rope for layer in run], np.int32)
    return data


def assemble(config: DecoderConfig, outer: Mapping[str, Any], runs: Sequence[Block]) -> Decoder:
    """A decoder from its runs and the arrays outside the layers, named as in `axis_table.OUTER_AXES`."""
    return Decoder(
        config,
        outer["embedding"],
        runs,
        final_norm=_norm(outer, "final_norm") if config.final_norm else None,
        head=_linear(outer, "head"),
        position_embedding=outer.get("position_embedding"),
        embedding_norm=_norm(outer, "embedding_norm") if config.embedding_norm else None,
        project_in=_linear(outer, "project_in"),
        project_out=_linear(outer, "project_out"),
    )


def _linear(arrays: Mapping[str, Any], name: str) -> Any:
    kernel = arrays.get(f"{name}.kernel")
    return None if kernel is None else Linear(kernel, arrays.get(f"{name}.bias"))


def _norm(arrays: Mapping[str, Any], name: str) -> Norm:
    return Norm(arrays.get(f"{name}.scale"), arrays.get(f"{name}.bias"))


def _build_block(arrays: Mapping[str, Any], config: DecoderConfig) -> Block:
    def optional_norm(name: str) -> Norm | None:
        return _norm(arrays, name) if f"{name}.scale" in arrays else None

    q, k, v, o = (_linear(arrays, f"attention.{name}") for name in "qkvo")
    q_norm, k_norm = optional_norm("attention.q_norm"), optional_norm("attention.k_norm")
    joint = {f"{name}_joint_norm": optional_norm(f"attention.{name}_joint_norm") for name in "qk"}
    data = {name: arrays.get(f"attention.{name}") for name in ("window", "slopes", "rope")}
    gate, up, down = (_linear(arrays, f"mlp.{name}") for name in ("gate", "up", "down"))
    return Block(
        _norm(arrays, "attention_norm") if config.pre_norms else None,
        Attention(q, k, v, o, q_norm, k_norm, **data, **joint, sinks=arrays.get("attention.sinks")),
        _norm(arrays, "mlp_norm") if config.pre_norms and not config.shared_norm else None,
        MLP(gate, up, down),
        optional_norm("attention_post_norm"),
        optional_norm("mlp_post_norm"),
        None if config.routing is None else _experts(arrays),
    )


def _experts(arrays: Mapping[str, Any]) -> Experts:
    prefix = "experts."
    return Experts({path.removeprefix(prefix): array for path, array in arrays.items() if path.startswith(prefix)})


def initialise(abstract: Decoder, key: Array, deviation: float = 0.02) -> Decoder:
    """An abstract decoder filled with random weights: normal matrices, norms of factor one, zero biases.

    Args:
      abstract: the decoder of `build`.
      key: key of the random numbers.
      deviation: standard deviation of the matrices.
    """
    unit = 0.0 if abstract.config.norm == "rms_plus_one" else 1.0

    def fill(path: jax.tree_util.KeyPath, leaf: Any) -> Array:
        name = axis_table.array_path(path)
        if axis_table.is_data(name):
            return jnp.asarray(leaf)
        if name.endswith(".scale"):
            return jnp.full(leaf.shape, unit, leaf.dtype)
        if name.endswith((".bias", "_bias")):
            return jnp.zeros(leaf.shape, leaf.dtype)
        keys.append(jax.random.fold_in(key, len(keys)))
        return (deviation * jax.random.normal(keys[-1], leaf.shape)).astype(leaf.dtype)

    keys: list[Array] = []
    return jax.tree_util.tree_map_with_path(fill, abstract)
