"""The space of a direction: what moves when one is followed, and what following it costs.

    weights     every block matrix, W + εz: a perturbed copy of one layer at a time
    low-rank    every block matrix, W + ε u vᵀ / √r as y = xW + ε (x·u) vᵀ / √r: no copy, W is shared by all directions
    gates       one factor 1 + εz for every group, on the input of its output projection: no copy

A space makes a layer that computes as if it had moved; the layer's own arrays stay where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax import groups, layers
from minillm_jax.decoder import group_count
from minillm_jax.estimate import directions
from minillm_jax.modules import MLP, Attention, Block, Linear

SPACES = ("weights", "low-rank", "gates")

# Where a gate's factor goes in: the matrix that leads from the groups back to the stream.
GATED = {"head": "attention.o", "channel": "mlp.down"}


@runtime_checkable
class Space(Protocol):
    """What the paired loss needs to know of a space."""

    copies: bool

    def moved(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], scale: Float[Array, ""]) -> Block:
        """One layer as it computes at `scale` along the direction of `key`."""
        ...


@dataclass(frozen=True)
class Weights:
    """All entries of all block matrices (MINI-LLM)."""

    distribution: str = "gaussian"
    copies: bool = True

    def moved(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], scale: Float[Array, ""]) -> Block:
        """See `Space`."""
        return directions.perturb(block, key, layer, scale, self.distribution)

    def add(
        self, target: Float[Array, "..."], scale: Array, key: Key[Array, ""], layer: Array, name: str
    ) -> Float[Array, "..."]:
        """A matrix moved along its part of a direction: target + scale · z, float32."""
        return directions.add(target, scale, key, layer, name, self.distribution)


@dataclass(frozen=True)
class LowRank:
    """Matrices u vᵀ / √r of rank r in the place of z; their entries have unit variance too."""

    rank: int = 1
    distribution: str = "gaussian"
    copies: bool = False

    def moved(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], scale: Float[Array, ""]) -> Block:
        """See `Space`."""

        def new(name: str, linear: Linear) -> LowRankLinear:
            u, v = self._factors(key, layer, name, linear.kernel.shape)
            return LowRankLinear(linear, u, scale * v)

        return _replace_linears(block, new)

    def add(
        self, target: Float[Array, "..."], scale: Array, key: Key[Array, ""], layer: Array, name: str
    ) -> Float[Array, "..."]:
        """A matrix moved along its part of a direction: target + scale · u vᵀ / √r, float32."""
        u, v = self._factors(key, layer, name, target.shape)
        return target + scale * jnp.tensordot(u, v, axes=1, precision=jax.lax.Precision.HIGHEST)

    def _factors(
        self, key: Key[Array, ""], layer: Array, name: str, shape: tuple[int, ...]
    ) -> tuple[Float[Array, "*inputs r"], Float[Array, "r *outputs"]]:
        inputs = len(groups.matrices()[name].split()[0])
        key_u, key_v = jax.random.split(directions.part_key(key, layer, name))
        u = directions.sample(key_u, (*shape[:inputs], self.rank), self.distribution)
        return u, directions.sample(key_v, (self.rank, *shape[inputs:]), self.distribution) * self.rank**-0.5


@dataclass(frozen=True)
class Gates:
    """One factor for every head (with its key/value group) and every channel."""

    distribution: str = "gaussian"
    copies: bool = False

    def moved(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], scale: Float[Array, ""]) -> Block:
        """See `Space`."""
        counts = {kind: group_count(block, kind) for kind in GATED}
        gates = {GATED[kind]: 1.0 + scale * z for kind, z in self.draw(key, layer, counts).items()}
        return gated(block, gates)

    def draw(self, key: Key[Array, ""], layer: Array, counts: dict[str, int]) -> dict[str, Float[Array, " _"]]:
        """A direction's part for one layer: kind -> one number for each of so many groups."""
        return {
            kind: directions.sample(directions.part_key(key, layer, GATED[kind]), (count,), self.distribution)
            for kind, count in counts.items()
        }


def make(space: str, distribution: str, rank: int) -> Any:
    """The space of that name."""
    match space:
        case "low-rank":
            return LowRank(rank, distribution)
        case "gates":
            return Gates(distribution)
    return Weights(distribution)


def gated(block: Block, gates: dict[str, Float[Array, " groups"]]) -> Block:
    """One layer with a factor on each group of the input of some matrices, by their names."""

    def new(name: str, linear: Linear) -> Linear:
        return GatedLinear(linear, gates[name]) if name in gates else linear

    return _replace_linears(block, new)


class LowRankLinear(Linear):
    """x · (kernel + u v) + bias, without making the sum."""

    def __init__(self, linear: Linear, u: Array, v: Array):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.u, self.v = nnx.Variable(u), nnx.Variable(v)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Linear`; `R` stands for the rank."""
        inputs, outputs = equation.split("->")
        x_letters, kernel = inputs.split(",")
        contracted = [letter for letter in kernel if letter in x_letters and letter not in outputs]
        thin = "".join(letter for letter in x_letters if letter not in contracted) + "R"
        narrow = layers.einsum(f"{x_letters},{''.join(contracted)}R->{thin}", x, self.u[...])
        added = kernel[len(contracted) :]
        moved = layers.einsum(f"{thin},R{added}->{outputs}", narrow, self.v[...])
        return super().__call__(equation, x) + moved


class GatedLinear(Linear):
    """(gate · x) · kernel + bias, one gate for each group of the input."""

    def __init__(self, linear: Linear, gate: Array):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.gate = nnx.Variable(gate)

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Linear`."""
        axis = 2  # [B, T, N, H] or [B, T, F]
        each = jnp.repeat(self.gate[...], x.shape[axis] // self.gate.shape[0])
        return super().__call__(equation, x * each.reshape(1, 1, -1, *(1,) * (x.ndim - 3)))


def _replace_linears(block: Block, new: Callable[[str, Linear], Linear]) -> Block:
    """A layer with every matrix replaced by `new(name, matrix)`."""
    attention, mlp = block.attention, block.mlp
    q, k, v, o = (new(f"attention.{name}", getattr(attention, name)) for name in "qkvo")
    window, slopes = (None if data is None else data[...] for data in (attention.window, attention.slopes))
    gate = None if mlp.gate is None else new("mlp.gate", mlp.gate)
    return Block(
        block.attention_norm,
        Attention(q, k, v, o, attention.q_norm, attention.k_norm, window, slopes),
        block.mlp_norm,
        MLP(gate, new("mlp.up", mlp.up), new("mlp.down", mlp.down)),
        block.attention_post_norm,
        block.mlp_post_norm,
    )
