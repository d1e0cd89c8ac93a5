"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): a pytree of factors beside the decoder.

A matrix W of the decoder computes x · W + (α / r) · x · A · B with an adapter. W itself is neither copied nor changed,
and it gets no gradient. `merge` adds (α / r) · A · B to every W in the end.

Every expert of a mixture has factors of its own. A row of tokens costs the products of the factors of its expert alone.
The router has none: a step of it changes which experts compute a token, and the loss jumps there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from minillm_jax.devices.sharding import MODEL, mesh_of, place, spec
from minillm_jax.model import axis_table, ops, padded_runs
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import PRODUCT, Block, Experts, Linear, depth, experts_of, run_letters
from minillm_jax.model.tree import all_matrices, replace_all_matrices, replace_linears
from minillm_jax.recovery.settings import Lora
from minillm_jax.scoring.gradient import directions


class Factors(NamedTuple):
    """The factors of one matrix, in all layers of a run or in one layer.

    Attributes:
      a: maps the inputs to the rank, float32, [L, inputs, R]; for matrices of experts [L, X, inputs, R].
      b: maps the rank to the outputs, float32, [L, R, outputs]; for matrices of experts [L, X, R, outputs].
    """

    a: Float[Array, "*L_X_inputs R"]
    b: Float[Array, "*L_X_R outputs"]


# For each run of the decoder: name of a matrix -> its factors.
Adapter = list[dict[str, Factors]]


def factor_axes(name: str) -> tuple[str, str]:
    """The axes of A and of B of a matrix in one layer; the rank has the letter R."""
    maps, inputs, outputs = axis_table.map_axes(name)
    return f"{maps}{inputs}R", f"{maps}R{outputs}"


def initial(decoder: Decoder, lora: Lora, seed: int) -> Adapter:
    """An adapter without effect: A uniform within ± 1 / √inputs, as PEFT draws it; B zero.

    The numbers depend on the seed, the layer and the matrix, and not on the runs or the devices. The host draws them:
    they are few, and a program for every shape would take longer to compile. Factors of experts are cut over the
    devices as the experts are; every device has all others whole.

    Args:
      decoder: the model; its shapes alone are read.
      lora: rank and targets. A matrix that is not there, or has lost all its groups, gets no factors.
      seed: of the draw.
    """
    first, adapter = 0, []
    for run in decoder.runs:
        layers, sizes = range(first, first + depth(run)), run_letters(run) | {"R": lora.rank}
        factors = {
            name: _initial_factors(name, sizes, seed, layers)
            for name, matrix in all_matrices(run).items()
            if name in lora.targets and matrix.size
        }
        adapter.append({name: cut_as_experts(name, pair, sizes, mesh_of(decoder)) for name, pair in factors.items()})
        first += depth(run)
    return adapter


def _initial_factors(name: str, sizes: Mapping[str, int], seed: int, layers: range) -> Factors:
    inputs, matrix = axis_table.map_axes(name)[1], list(axis_table.all_matrices()).index(name)
    a, b = (axis_table.shape(axes, sizes) for axes in factor_axes(name))
    bound = math.prod(axis_table.shape(inputs, sizes)) ** -0.5

    def draw(layer: int) -> np.ndarray:
        numbers = np.random.default_rng((seed, directions.STREAMS["adapter"], layer, matrix))
        return numbers.uniform(-bound, bound, a).astype(np.float32)

    return Factors(jnp.asarray(np.stack([draw(layer) for layer in layers])), jnp.zeros((len(layers), *b), jnp.float32))


def cut_as_experts(name: str, factors: Factors, sizes: Mapping[str, int], mesh: Mesh | None) -> Factors:
    """The factors of a matrix of experts in the shards of the experts; all others, or without a mesh, unchanged."""
    if mesh is None or name not in axis_table.expert_matrices():
        return factors
    places = [NamedSharding(mesh, spec(f"L{axes}", sizes, mesh.shape[MODEL])) for axes in factor_axes(name)]
    return Factors(*(place(factor, where) for factor, where in zip(factors, places, strict=True)))


class AdaptedLinear(Linear):
    """x · kernel + bias + scale · dropout(x) · A · B."""

    def __init__(self, linear: Linear, factors: Factors, scale: float, drop: Callable[[Array], Array]):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.a, self.b = nnx.Variable(factors.a), nnx.Variable(factors.b)
        self.scale, self.drop = scale, drop

    def product(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Linear`. The term of the adapter is added in float32."""
        y = super().product(equation, x)
        inputs = self.a.ndim - 1
        a, b = ops.merge_axes(self.a[...], inputs), ops.merge_axes(self.scale * self.b[...], 1)
        change = low_rank_product(ops.merge_last(self.drop(x), inputs), a, b)
        return (y + change.reshape(y.shape)).astype(y.dtype)


class AdaptedExperts(Experts):
    """Experts with low-rank factors beside their matrices.

    There is no dropout: PEFT, which adapts the whole array of the experts, has none there.
    """

    def __init__(self, experts: Experts, factors: Mapping[str, Factors], scale: float):
        for path in axis_table.BLOCK_AXES:
            if path.startswith("experts."):
                name = path.removeprefix("experts.")
                setattr(self, name, getattr(experts, name))
        self.factors = nnx.Dict(
            {
                f"{name}_{letter}": nnx.Variable(factor)
                for name, (a, b) in factors.items()
                for letter, factor in (("a", a), ("b", scale * b))
            }
        )

    def low_rank(self) -> Mapping[str, Array]:
        """See `Experts`."""
        return {name: factor[...] for name, factor in self.factors.items()}


@jax.custom_vjp
def low_rank_product(x: Float[Array, "B T I"], a: Float[Array, "I R"], b: Float[Array, "R O"]) -> Float[Array, "B T O"]:
    """The product x · a · b, with a gradient that never transposes a wide array.

    The gradients by a and b sum products over all positions. XLA transposes the first operand of such a product, and
    JAX's own rules put the wide operand first; the copies took 15 % of an update on a CPU (docs/LOG.md).
    """
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    narrow = checkpoint_name(ops.einsum("BTI,IR->BTR", x, a), PRODUCT)
    return ops.einsum("BTR,RO->BTO", narrow, b), (x, narrow, a, b)


def _low_rank_backward(kept: tuple[Array, ...], change: Float[Array, "B T O"]) -> tuple[Array, Array, Array]:
    x, narrow, a, b = kept
    moved = ops.einsum("BTO,RO->BTR", change, b)
    by_x = ops.einsum("BTR,IR->BTI", moved, a, out=x.dtype)
    by_a = ops.einsum("BTR,BTI->RI", moved, x, out=a.dtype)
    by_b = ops.einsum("BTR,BTO->RO", narrow, change, out=b.dtype)
    return by_x, by_a.T, by_b


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def adapted(
    block: Block, factors: dict[str, Factors], lora: Lora, key: Key[Array, ""] | None, layer: Int[Array, ""]
) -> Block:
    """One layer that computes with its adapter.

    Args:
      block: the layer's arrays.
      factors: the factors of the layer, by the name of the matrix.
      lora: scale and dropout.
      key: of the dropout; None for none, as in evaluation.
      layer: index of the layer in the model.
    """

    def new(name: str, linear: Linear) -> Linear:
        if name not in factors:
            return linear
        return AdaptedLinear(linear, factors[name], lora.scale, _dropout(lora.dropout, key, layer, name))

    changed = replace_linears(block, new)
    names = [name for name in axis_table.expert_matrices() if name in factors]
    if names:
        of_experts = {name.split(".")[1]: factors[name] for name in names}
        changed.experts = AdaptedExperts(experts_of(block), of_experts, lora.scale)
    return changed


def _dropout(
    rate: float, key: Key[Array, ""] | None, layer: Int[Array, ""], name: str
) -> Callable[[Float[Array, "..."]], Float[Array, "..."]]:
    if key is None or not rate:
        return lambda x: x

    def drop(x: Array) -> Array:
        kept = jax.random.bernoulli(directions.part_key(key, layer, name), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

    return drop


def one_run(runs: Sequence[Block], adapter: Adapter) -> Adapter:
    """The adapter of `padded_runs.one_run`, inside a compiled program: zeros beside heads and channels of zeros.

    Args:
      runs: the runs of the decoder.
      adapter: its factors; a matrix that a run has lost gets zeros.
    """
    sizes, found = padded_runs.largest(runs), {}
    for name in dict.fromkeys(name for factors in adapter for name in factors):
        axes, pieces = factor_axes(name), []
        for run, factors in zip(runs, adapter, strict=True):
            before = padded_runs.letters_of(run)
            a, b = factors.get(name) or _empty(adapter, name, before["L"])
            a, b = (
                padded_runs.padded(factor, f"L{letters}", before, sizes)
                for factor, letters in zip((a, b), axes, strict=True)
            )
            pieces.append(Factors(a, b))
        found[name] = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    return [found]


def _empty(adapter: Adapter, name: str, layers: int) -> Factors:
    """Factors without elements, in the place of those of a matrix that is not there."""
    a, b = next(factors[name] for factors in adapter if name in factors)
    return Factors(
        jnp.zeros((layers, *(0,) * (a.ndim - 2), a.shape[-1])), jnp.zeros((layers, b.shape[1], *(0,) * (b.ndim - 2)))
    )


def merge(decoder: Decoder, adapter: Adapter, lora: Lora) -> Decoder:
    """A decoder whose matrices hold W + (α / r) · A · B, computed in float32 and rounded to the type of W."""
    return with_runs(decoder, [_merged_run(run, factors, lora.scale) for run, factors in _paired(decoder, adapter)])


@jax.jit
def _product(kernel: Float[Array, "L ..."], factors: Factors, scale: float | Float[Array, ""]) -> Float[Array, "L ..."]:
    a, b = factors
    # The axes before the inputs: L, and X for experts.
    maps, rank = a.ndim + b.ndim - kernel.ndim - 2, a.shape[-1]
    count = math.prod(kernel.shape[:maps])
    change = ops.einsum("CIR,CRO->CIO", a.reshape(count, -1, rank), b.reshape(count, rank, -1))
    return (kernel.astype(jnp.float32) + scale * change.reshape(kernel.shape)).astype(kernel.dtype)


def _merged_run(run: Block, factors: dict[str, Factors], scale: float) -> Block:
    return replace_all_matrices(
        run, lambda name, kernel: _product(kernel, factors[name], scale) if name in factors else kernel
    )


def _paired(decoder: Decoder, adapter: Adapter) -> Sequence[tuple[Block, dict[str, Factors]]]:
    return list(zip(decoder.runs, adapter, strict=True))


def size(adapter: Adapter) -> int:
    """Number of parameters of an adapter."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))
