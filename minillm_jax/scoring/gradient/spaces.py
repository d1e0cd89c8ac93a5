"""The space of a direction: what moves when one is followed, and what following it costs.

    weights     every block matrix, W + εz: a perturbed copy of one layer at a time
    low-rank    every block matrix, W + ε u vᵀ / √r as y = xW + ε (x·u) vᵀ / √r: no copy, W is shared by all directions
    gates       one factor 1 + εz for every group, on the input of its output projection: no copy

A space makes a layer that computes as if it had moved; the layer's own arrays stay where they are. How far it moves is
a step: a finite one, or none at all but with a derivative.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax.model import axis_table, ops
from minillm_jax.model.decoder import Decoder, scan_layers
from minillm_jax.model.modules import MLP, Attention, Block, Linear, depth
from minillm_jax.model.tree import group_count, kernels, replace_kernels
from minillm_jax.scoring.gradient import directions

SPACES = ("weights", "low-rank", "gates")

# Where a gate's factor goes in: the matrix that leads from the groups back to the stream.
GATED = {"head": "attention.o", "channel": "mlp.down"}

# From what is to be moved, and a function that adds so many times the direction to it: what it computes with.
Step = Callable[[Array, Callable[[Array, Array], Array]], Array]


def finite(scale: Float[Array, ""]) -> Step:
    """The step of that length: target + scale · z, float32 whatever the target is.

    Rounding W + εz to bfloat16 would lose most of z.
    """
    return lambda target, add: add(target.astype(jnp.float32), scale)


def derivative(scale: Float[Array, ""]) -> Step:
    """No step, whose derivative by `scale` at zero is z: exact in any type, because nothing small is added.

    The target is passed on as it is, so that what is computed without the step is the same for all directions and
    `jax.vmap` computes it once.
    """

    def step(target: Array, add: Callable[[Array, Array], Array]) -> Array:
        return _nudge(scale, target, add(jnp.zeros(target.shape, jnp.float32), jnp.float32(1.0)))

    return step


@jax.custom_jvp
def _nudge(scale: Array, target: Array, change: Array) -> Array:
    return target


@_nudge.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    (_, target, change), (along, moving, _) = primals, tangents
    return target, moving + (along * change).astype(target.dtype)


@runtime_checkable
class Space(Protocol):
    """What the estimators need to know of a space."""

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """One layer as it computes after a step along the direction of `key`.

        Args:
          block: the layer.
          key: of the direction.
          layer: its index in the whole model.
          step: `finite` or `derivative`.
          windows: number of every sequence in the calibration set, for directions that depend on it.
        """
        ...

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """The sum of squares of a direction's entries in one layer, and their number."""
        ...


@dataclass(frozen=True)
class Weights:
    """All entries of all block matrices (MINI-LLM)."""

    distribution: str = "gaussian"

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """See `Space`."""

        def new(name: str, kernel: Array) -> Array:
            return step(kernel, partial(self.add, key=key, layer=layer, name=name))

        return replace_kernels(block, new)

    def add(
        self, target: Float[Array, "..."], scale: Array, key: Key[Array, ""], layer: Array, name: str
    ) -> Float[Array, "..."]:
        """A matrix moved along its part of a direction: target + scale · z, float32."""
        return directions.add(target, scale, key, layer, name, self.distribution)

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`."""
        return _square_length_of_matrices(self, block, key, layer)


@dataclass(frozen=True)
class LowRank:
    """Matrices u vᵀ / √r of rank r in the place of z; their entries have unit variance too."""

    rank: int = 1
    distribution: str = "gaussian"

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """See `Space`."""

        def new(name: str, linear: Linear) -> LowRankLinear:
            return LowRankLinear(linear, *self._factors(key, layer, name, linear.kernel.shape), step)

        return _replace_linears(block, new)

    def add(
        self, target: Float[Array, "..."], scale: Array, key: Key[Array, ""], layer: Array, name: str
    ) -> Float[Array, "..."]:
        """A matrix moved along its part of a direction: target + scale · u vᵀ / √r, float32."""
        u, v = self._factors(key, layer, name, target.shape)
        return target + scale * jnp.tensordot(u, v, axes=1, precision=jax.lax.Precision.HIGHEST)

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`."""
        return _square_length_of_matrices(self, block, key, layer)

    def _factors(
        self, key: Key[Array, ""], layer: Array, name: str, shape: tuple[int, ...]
    ) -> tuple[Float[Array, "*inputs r"], Float[Array, "r *outputs"]]:
        inputs = len(axis_table.matrices()[name].split()[0])
        key_u, key_v = jax.random.split(directions.part_key(key, layer, name))
        u = directions.sample(key_u, (*shape[:inputs], self.rank), self.distribution)
        return u, directions.sample(key_v, (self.rank, *shape[inputs:]), self.distribution) * self.rank**-0.5


@dataclass(frozen=True)
class Gates:
    """One factor for every head (with its key/value group) and every channel.

    With `per_sequence` every sequence follows a direction of its own, at the same cost: the projected gradient is then
    one number for every direction and sequence, and there are as many times more of them to average.
    """

    distribution: str = "gaussian"
    per_sequence: bool = False

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """See `Space`."""
        counts = {kind: group_count(block, kind) for kind in GATED}
        return gated(block, self.draw(key, layer, counts, windows), step)

    def draw(
        self, key: Key[Array, ""], layer: Array, counts: dict[str, int], windows: Int[Array, " B"]
    ) -> dict[str, Float[Array, "#B _"]]:
        """A direction's part for one layer: kind -> one number for each of so many groups (and sequence, or one)."""

        def one(key: Array, kind: str) -> Array:
            return directions.sample(key, (counts[kind],), self.distribution)

        parts = {kind: directions.part_key(key, layer, GATED[kind]) for kind in counts}
        if not self.per_sequence:
            return {kind: one(part, kind)[None] for kind, part in parts.items()}
        own = jax.vmap(jax.random.fold_in, (None, 0))
        return {kind: jax.vmap(partial(one, kind=kind))(own(part, windows)) for kind, part in parts.items()}

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`; of a direction that all sequences share."""
        counts = {kind: group_count(block, kind) for kind in GATED}
        drawn = self.draw(key, layer, counts, jnp.zeros(1, jnp.int32))
        return jnp.stack([sum(jnp.sum(jnp.square(z)) for z in drawn.values()), jnp.float32(sum(counts.values()))])


def make(space: str, distribution: str, rank: int, per_sequence: bool) -> Any:
    """The space of that name."""
    match space:
        case "low-rank":
            return LowRank(rank, distribution)
        case "gates":
            return Gates(distribution, per_sequence)
    return Weights(distribution)


def gate_counts(decoder: Decoder) -> list[tuple[Int[Array, " L"], tuple[tuple[str, int], ...]]]:
    """For each run: the indices of its layers, and how many gates of each kind a layer has."""
    found, first = [], 0
    for run in decoder.runs:
        layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
        found.append((layers, tuple((kind, group_count(run, kind)) for kind in GATED)))
        first += depth(run)
    return found


@partial(jax.jit, static_argnames="space")
def lengths(decoder: Decoder, keys: Key[Array, " P"], space: Space) -> Float[Array, " P"]:
    """√d / ‖z‖ of every direction z of d entries: the factor that puts it on the sphere of radius √d."""

    def one(key: Array) -> Array:
        def step(total: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
            return total + space.square_length(block, key, layer), None

        squares, count = scan_layers(decoder.runs, step, jnp.zeros(2))[0]
        return jnp.sqrt(count / squares)

    return jax.lax.map(one, keys)


def _square_length_of_matrices(space: Weights | LowRank, block: Block, key: Array, layer: Array) -> Float[Array, "2"]:
    total, entries = jnp.float32(0), 0
    for name, kernel in kernels(block).items():
        z = space.add(jnp.zeros(kernel.shape, jnp.float32), jnp.float32(1.0), key, layer, name)
        total, entries = total + jnp.sum(jnp.square(z)), entries + z.size
    return jnp.stack([total, jnp.float32(entries)])


def gated(block: Block, direction: dict[str, Float[Array, "#B groups"]], step: Step) -> Block:
    """One layer as it computes after a step from gates of one along a direction, kind -> a number for each group."""
    drawn = {GATED[kind]: z for kind, z in direction.items()}

    def new(name: str, linear: Linear) -> Linear:
        return GatedLinear(linear, drawn[name], step) if name in drawn else linear

    return _replace_linears(block, new)


class LowRankLinear(Linear):
    """x · (kernel + u v) + bias after a step along u v, without making the sum."""

    def __init__(self, linear: Linear, u: Array, v: Array, step: Step):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.u, self.v = nnx.Variable(u), nnx.Variable(v)
        self.step = step

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Linear`; `R` stands for the rank."""
        inputs, outputs = equation.split("->")
        x_letters, kernel = inputs.split(",")
        contracted = [letter for letter in kernel if letter in x_letters and letter not in outputs]
        thin = "".join(letter for letter in x_letters if letter not in contracted) + "R"
        added = kernel[len(contracted) :]

        def add(target: Array, scale: Array) -> Array:
            narrow = ops.einsum(f"{x_letters},{''.join(contracted)}R->{thin}", x, self.u[...])
            return target + ops.einsum(f"{thin},R{added}->{outputs}", narrow, scale * self.v[...])

        return self.step(super().__call__(equation, x), add)


class GatedLinear(Linear):
    """(gate · x) · kernel + bias after a step from gates of one, one gate for each group of the input."""

    def __init__(self, linear: Linear, direction: Float[Array, "#B groups"], step: Step):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.direction = nnx.Variable(direction)
        self.step = step

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `Linear`."""
        change = spread(self.direction[...], x) * x
        return super().__call__(equation, self.step(x, lambda target, scale: target + scale * change))


def spread(
    gates: Float[Array, "#B groups"], x: Float[Array, "B T groups_of *rest"]
) -> Float[Array, "#B 1 groups_of *ones"]:
    """One number for each group, repeated over the heads (or the one channel) that it has along axis 2 of x."""
    each = jnp.repeat(gates, x.shape[2] // gates.shape[1], axis=1)
    return each.reshape(each.shape[0], 1, each.shape[1], *(1,) * (x.ndim - 3))


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
