"""Iterative refinement: the rows of a refit to the digits of float64, from a factor in float32.

The system of `system.System` is not made. The moments are about the reference points a and b of the walk, and an
estimate X of the rows leaves

    residual = G₀ V + γ C₀ + λ (W − X)        V = (1 − γ) W − X

    without a bias    G₀ = G + z aᵀ + a sᵀ    C₀ = C + a rᵀ + z bᵀ        z = s + n a
    with a bias       G₀ = G − s sᵀ / n       C₀ = C − s rᵀ / n

with the moments G (`gram`), s (`inputs`), C (`cross`), r (`targets`) of n tokens. A step computes the residual in
float64, solves for the change with the factor, and adds it to X. With the condition number κ, a step multiplies the
error by about κ · 6e-8 (Higham, Accuracy and Stability of Numerical Algorithms, section 12.1). A residual in float32
would leave an error of κ · 6e-8: 1e-3 of the rows at a ridge of 1e-4.

    I    input features        i    those whose rows this device holds        D    output features of this device
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from minillm_jax.pruning.blocked import Rows
from minillm_jax.pruning.float64 import Pair, double, in_float64, pair, plus, product

# The refinement ends when the error is expected to be this share of the rows, so that nearly all rounded rows are those
# of float64, bit for bit: one that is not changes the groups that later layers keep (docs/LOG.md).
TOLERANCE = 2.0**-44
# It also ends where a change is not half of the one before: float64 has no more digits for the system, or float32 no
# factor. The rows are sound if the last change is this share of them at most.
SOUND = 2.0**-24
# Most steps.
MOST = 32

# Right-hand sides [I, D] -> the solution in float32.
Solve = Callable[[Float[Array, "I D"]], Float[Array, "I D"]]


class Targets(NamedTuple):
    """Some columns of what a matrix is fitted to.

    Attributes:
      cross: C.
      targets: r.
      center: b.
      kernel: W, in its own type.
    """

    cross: Float[Array, "I D"]
    targets: Float[Array, " D"]
    center: Float[Array, " D"]
    kernel: Shaped[Array, "I D"]


class _State(NamedTuple):
    """A refinement after some steps.

    Attributes:
      found: X.
      change: norm of the last change.
      done: whether more steps are of no use.
      sound: whether X is near the solution.
      steps: number of steps.
    """

    found: Pair
    change: Float[Array, ""]
    done: Bool[Array, ""]
    sound: Bool[Array, ""]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class Equations:
    """The equations of the kept rows.

    Attributes:
      gram: G, the rows of this device.
      inputs: s.
      center: a.
      inside: whether a row is kept.
      tokens: n.
      towards: γ.
      ridge: λ, from `ridge_of`.
      biased: whether the map has a bias.
      rows: how the rows lie on the devices.
    """

    gram: Float[Array, "i I"]
    inputs: Float[Array, " I"]
    center: Float[Array, " I"]
    inside: Bool[Array, " I"]
    tokens: Pair
    towards: Pair
    ridge: Pair
    biased: bool
    rows: Rows

    def added(self) -> tuple[Float[Array, "I K"], Float[Array, "K I"]]:
        """The factors of G₀ − G, float32."""
        if self.biased:
            return self.inputs[:, None], -self.inputs[None] / self.tokens.high
        about_zero = self.inputs + self.tokens.high * self.center
        return jnp.stack([about_zero, self.center], axis=1), jnp.stack([self.center, self.inputs])

    def solved(self, solve: Solve, part: Targets) -> tuple[Pair, Bool[Array, ""]]:
        """The kept rows, zeros elsewhere, and whether they are sound."""

        def size(array: Array) -> Array:
            return jnp.sqrt(self.rows.total(jnp.sum(array * array)))

        def unfinished(state: _State) -> Array:
            return ~state.done & (state.steps < MOST)

        def step(state: _State) -> _State:
            change = solve(self.residual(state.found, part))
            found = plus(state.found, change)
            last, whole = size(change), size(found.high)
            # The next change would be smaller by the same factor.
            enough = last * last <= TOLERANCE * whole * state.change
            done = (state.steps > 0) & (enough | ~(last < state.change / 2))
            return _State(found, last, done, enough | (last <= SOUND * whole), state.steps + 1)

        nothing, no = jnp.zeros_like(part.cross), jnp.bool_(False)
        last = lax.while_loop(unfinished, step, _State(Pair(nothing, nothing), jnp.float32(0), no, no, jnp.int32(0)))
        return last.found, last.sound

    def residual(self, found: Pair, part: Targets) -> Float[Array, "I D"]:
        """What is left of the right-hand side by some rows, rounded; zeros in the rows that are not kept."""
        ahead = self._ahead(found, part)
        return self._residual(found, part, ahead, product(self.gram, ahead, self.rows))

    @in_float64
    def _ahead(self, found: Pair, part: Targets) -> Pair:
        return pair(self._v(found, part))

    def _v(self, found: Pair, part: Targets) -> Float[Array, "I D"]:
        """V in float64; for functions of `in_float64`."""
        return (1 - double(self.towards)) * double(part.kernel) - double(found)

    @in_float64
    def _residual(self, found: Pair, part: Targets, ahead: Pair, products: Pair) -> Float[Array, "I D"]:
        n, towards, v = double(self.tokens), double(self.towards), double(ahead)
        s, a, r, b = (double(array) for array in (self.inputs, self.center, part.targets, part.center))

        def along(vector: Array) -> Array:
            return jnp.sum(vector[:, None] * v, axis=0)

        rest = double(products) + towards * double(part.cross)
        if self.biased:
            rest = rest - jnp.outer(s, (along(s) + towards * r) / n)
        else:
            rest = rest + jnp.outer(s + n * a, along(a) + towards * b) + jnp.outer(a, along(s) + towards * r)
        rest = rest + double(self.ridge) * (double(part.kernel) - double(found))
        return jnp.where(self.inside[:, None], rest, 0).astype(jnp.float32)

    @in_float64
    def shift(self, found: Pair, part: Targets) -> Pair:
        """The change of the bias that gives the output with these rows the mean of the target."""
        mean = double(self.center) + double(self.inputs) / double(self.tokens)
        target = double(part.center) + double(part.targets) / double(self.tokens)
        return pair(jnp.sum(mean[:, None] * self._v(found, part), axis=0) + double(self.towards) * target)


@in_float64
def ridge_of(
    share: Pair,
    diagonal: Float[Array, " I"],
    inputs: Float[Array, " I"],
    center: Float[Array, " I"],
    tokens: Pair,
    biased: bool,
) -> Pair:
    """λ, a share of the mean diagonal of G₀; the share itself where that is zero.

    Args:
      share: the share.
      diagonal: the diagonal of G.
      inputs: s.
      center: a.
      tokens: n.
      biased: whether the map has a bias.
    """
    s, a, n = double(inputs), double(center), double(tokens)
    moved = -s * s / n if biased else a * (2 * s + n * a)
    mean = jnp.mean(double(diagonal) + moved)
    return pair(double(share) * jnp.where(mean == 0, 1.0, mean))
