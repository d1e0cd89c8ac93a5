"""Spaces of directions: the numbers of a model that a direction moves, and the memory that this takes.

    weights     every block matrix, W + εz; takes a perturbed copy of one layer at a time
    low-rank    every block matrix, W + ε u vᵀ / √r, computed as y = xW + ε (x·u) vᵀ / √r; all directions share W
    gates       one factor 1 + εz for every group, on the input of its output projection; takes no copy

A space returns a layer that computes with moved weights or gates. The arrays of the original layer do not change. A
step says how far a direction moves the layer: `finite` moves it by a length, `derivative` does not move it but carries
the derivative along the direction.
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
from minillm_jax.model.modules import Block, Linear, depth
from minillm_jax.model.tree import group_count, kernels, replace_kernels, replace_linears
from minillm_jax.scoring.gradient import directions

# Kind of group -> output projection of the groups; the gates multiply its input.
GATED = {"head": "attention.o", "channel": "mlp.down"}

# target, add -> moved target; `add(target, scale)` returns target + scale · z.
Step = Callable[[Array, Callable[[Array, Array], Array]], Array]


def finite(scale: Float[Array, ""]) -> Step:
    """A step of the length `scale`: target + scale · z.

    The result is float32 whatever the type of the target is: rounding W + εz to bfloat16 would lose most of z.
    """
    return lambda target, add: add(target.astype(jnp.float32), scale)


def derivative(scale: Float[Array, ""]) -> Step:
    """A step of length zero, whose derivative by `scale` is z: exact in any type, because nothing small is added.

    The value of the target does not change, so it is the same for all directions and `jax.vmap` computes it once.
    """

    def step(target: Array, add: Callable[[Array, Array], Array]) -> Array:
        return _nudge(scale, target, add(jnp.zeros(target.shape, jnp.float32), jnp.float32(1.0)))

    return step


@jax.custom_jvp
def _nudge(scale: Array, target: Array, change: Array) -> Array:
    return target


@_nudge.defjvp
def _(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    (_, target, change), (scale_tangent, target_tangent, _) = primals, tangents
    return target, target_tangent + (scale_tangent * change).astype(target.dtype)


@runtime_checkable
class Space(Protocol):
    """The methods of a space that the estimates call."""

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """One layer after a step along a direction.

        Args:
          block: the layer's arrays.
          key: the key of the direction.
          layer: index of the layer in the model.
          step: `finite` or `derivative`.
          windows: the number of each window among all calibration windows; `Gates` with `per_sequence` reads it.
        """
        ...

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """The sum of squares of a direction's entries in one layer, and the number of entries."""
        ...


@dataclass(frozen=True)
class Weights:
    """Directions over all entries of all block matrices (MINI-LLM, arXiv 2407.11681)."""

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
        """One matrix moved along a direction: target + scale · z, float32 (see `directions.add`)."""
        return directions.add(target, scale, key, layer, name, self.distribution)

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`."""
        return _square_length_of_matrices(self, block, key, layer)


@dataclass(frozen=True)
class LowRank:
    """Directions over all block matrices whose entries form a matrix u vᵀ / √r of rank r, with unit variance."""

    rank: int = 1
    distribution: str = "gaussian"

    def moved(
        self, block: Block, key: Key[Array, ""], layer: Int[Array, ""], step: Step, windows: Int[Array, " B"]
    ) -> Block:
        """See `Space`."""

        def new(name: str, linear: Linear) -> LowRankLinear:
            return LowRankLinear(linear, *self._factors(key, layer, name, linear.kernel.shape), step)

        return replace_linears(block, new)

    def add(
        self, target: Float[Array, "..."], scale: Array, key: Key[Array, ""], layer: Array, name: str
    ) -> Float[Array, "..."]:
        """One matrix moved along a direction: target + scale · u vᵀ / √r, float32."""
        u, v = self._factors(key, layer, name, target.shape)
        return target + scale * jnp.tensordot(u, v, axes=1, precision=jax.lax.Precision.HIGHEST)

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`."""
        return _square_length_of_matrices(self, block, key, layer)

    def _factors(
        self, key: Key[Array, ""], layer: Array, name: str, shape: tuple[int, ...]
    ) -> tuple[Float[Array, "*inputs r"], Float[Array, "r *outputs"]]:
        """The factors u and vᵀ / √r of one matrix."""
        inputs = len(axis_table.matrices()[name].split()[0])
        key_u, key_v = jax.random.split(directions.part_key(key, layer, name))
        u = directions.sample(key_u, (*shape[:inputs], self.rank), self.distribution)
        return u, directions.sample(key_v, (self.rank, *shape[inputs:]), self.distribution) * self.rank**-0.5


@dataclass(frozen=True)
class Gates:
    """Directions over one factor for every head and every channel.

    With `per_sequence` every window has a different direction, at the same cost. The projected gradient is then one
    number for every direction and window, and the estimate is a mean over B times as many directions.
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
        """The entries of a direction in one layer: kind -> [B, groups] with `per_sequence`, [1, groups] without.

        Args:
          key: the key of the direction.
          layer: index of the layer in the model.
          counts: kind -> number of groups in the layer.
          windows: the number of each window among all calibration windows.
        """

        def sample(key: Array, kind: str) -> Array:
            return directions.sample(key, (counts[kind],), self.distribution)

        keys = {kind: directions.part_key(key, layer, GATED[kind]) for kind in counts}
        if not self.per_sequence:
            return {kind: sample(kind_key, kind)[None] for kind, kind_key in keys.items()}
        window_keys = jax.vmap(jax.random.fold_in, (None, 0))
        return {
            kind: jax.vmap(partial(sample, kind=kind))(window_keys(kind_key, windows))
            for kind, kind_key in keys.items()
        }

    def square_length(self, block: Block, key: Key[Array, ""], layer: Int[Array, ""]) -> Float[Array, "2"]:
        """See `Space`. All windows share the direction."""
        counts = {kind: group_count(block, kind) for kind in GATED}
        direction = self.draw(key, layer, counts, jnp.zeros(1, jnp.int32))
        squares = sum(jnp.sum(jnp.square(z)) for z in direction.values())
        return jnp.stack([squares, jnp.float32(sum(counts.values()))])


def make(space: str, distribution: str, rank: int, per_sequence: bool) -> Any:
    """The space of a name.

    Args:
      space: a name of `settings.SPACES`.
      distribution: a name of `settings.DISTRIBUTIONS`.
      rank: rank of the directions in `low-rank`.
      per_sequence: whether every window has a different direction in `gates`.
    """
    match space:
        case "low-rank":
            return LowRank(rank, distribution)
        case "gates":
            return Gates(distribution, per_sequence)
    return Weights(distribution)


def gate_counts(decoder: Decoder) -> list[tuple[Int[Array, " L"], tuple[tuple[str, int], ...]]]:
    """For each run: the indices of its layers, and the number of gates of each kind in one layer."""
    counts, first = [], 0
    for run in decoder.runs:
        layers = jnp.arange(first, first + depth(run), dtype=jnp.int32)
        counts.append((layers, tuple((kind, group_count(run, kind)) for kind in GATED)))
        first += depth(run)
    return counts


@partial(jax.jit, static_argnames="space")
def lengths(decoder: Decoder, keys: Key[Array, " P"], space: Space) -> Float[Array, " P"]:
    """The factor √d / ‖z‖ of every direction z with d entries, which scales the direction to the length √d."""

    def factor(key: Array) -> Array:
        def step(total: Array, block: Block, layer: Array, extra: None) -> tuple[Array, None]:
            return total + space.square_length(block, key, layer), None

        squares, count = scan_layers(decoder.runs, step, jnp.zeros(2))[0]
        return jnp.sqrt(count / squares)

    return jax.lax.map(factor, keys)


def _square_length_of_matrices(space: Weights | LowRank, block: Block, key: Array, layer: Array) -> Float[Array, "2"]:
    """`square_length` of a space over block matrices."""
    total, entries = jnp.float32(0), 0
    for name, kernel in kernels(block).items():
        z = space.add(jnp.zeros(kernel.shape, jnp.float32), jnp.float32(1.0), key, layer, name)
        total, entries = total + jnp.sum(jnp.square(z)), entries + z.size
    return jnp.stack([total, jnp.float32(entries)])


def gated(block: Block, direction: dict[str, Float[Array, "#B groups"]], step: Step) -> Block:
    """One layer with gates, after a step from gates of 1 along a direction.

    Args:
      block: the layer's arrays.
      direction: kind of group -> entries of the direction, for every window or for all windows together.
      step: `finite` or `derivative`.
    """
    by_projection = {GATED[kind]: z for kind, z in direction.items()}

    def new(name: str, linear: Linear) -> Linear:
        return GatedLinear(linear, by_projection[name], step) if name in by_projection else linear

    return replace_linears(block, new)


class LowRankLinear(Linear):
    """x · (kernel + u v) + bias after a step along u v, computed without the sum kernel + u v."""

    def __init__(self, linear: Linear, u: Array, v: Array, step: Step):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.u, self.v = nnx.Variable(u), nnx.Variable(v)
        self.step = step

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Linear`."""

        def add(target: Array, scale: Array) -> Array:
            return target + ops.factored_einsum(equation, x, self.u[...], scale * self.v[...])

        return self.step(super().__call__(equation, x), add)


class GatedLinear(Linear):
    """(gate · x) · kernel + bias after a step from gates of 1, with one gate for each group of the input."""

    def __init__(self, linear: Linear, direction: Float[Array, "#B groups"], step: Step):
        self.kernel, self.bias = linear.kernel, linear.bias
        self.direction = nnx.Variable(direction)
        self.step = step

    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """See `Linear`."""
        change = spread(self.direction[...], x) * x
        return super().__call__(equation, self.step(x, lambda target, scale: target + scale * change))


def spread(
    gates: Float[Array, "#B groups"], x: Float[Array, "B T groups_of *rest"]
) -> Float[Array, "#B 1 groups_of *ones"]:
    """The gates, repeated along axis 2 of x: every query head of a group gets the gate of the group."""
    repeated = jnp.repeat(gates, x.shape[2] // gates.shape[1], axis=1)
    return repeated.reshape(repeated.shape[0], 1, repeated.shape[1], *(1,) * (x.ndim - 3))
