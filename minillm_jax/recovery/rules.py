"""How an update changes the parameters: by a gradient and AdamW, or by MeZO.

A rule is a compiled program over the parameters and a state of its own. A call reads one micro-batch; the last call of
an update changes the parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block
from minillm_jax.model.tree import replace_all_matrices
from minillm_jax.recovery import objective
from minillm_jax.recovery.gradients import Gradient, Part
from minillm_jax.recovery.objective import Sums
from minillm_jax.recovery.optimizer import was_finite
from minillm_jax.recovery.trained import Matrices, Parameters, TrainedMatrices, hidden_states
from minillm_jax.scoring.gradient import directions
from minillm_jax.scoring.gradient.spaces import Weights, finite

# parameters, state, decoder, micro-batch -> parameters, state, sums of the loss.
Program = Callable[[Parameters, Any, Decoder, Part], tuple[Parameters, Any, Sums]]


@runtime_checkable
class Rule(Protocol):
    """The methods that the training loop calls."""

    def init(self, parameters: Parameters) -> Any:
        """The state before the first call."""
        ...

    def program(self) -> Program:
        """The compiled program of one call; it uses the memory of parameters and state again."""
        ...

    def was_finite(self, state: Any) -> bool:
        """Whether the last gradient or loss was finite."""
        ...


@dataclass(frozen=True)
class ByGradient:
    """Updates of an optimiser of optax.

    Attributes:
      gradient: of `gradients`.
      optimizer: of `optimizer.optimizer`; accumulates the gradients of the calls of an update.
    """

    gradient: Gradient
    optimizer: optax.MultiSteps

    def init(self, parameters: Parameters) -> Any:
        """See `Rule`."""
        return self.optimizer.init(parameters)

    def program(self) -> Program:
        """See `Rule`."""

        @partial(jax.jit, donate_argnums=(0, 1))
        def program(parameters: Parameters, state: Any, decoder: Decoder, part: Part) -> tuple[Any, Any, Sums]:
            found, sums = self.gradient(parameters, decoder, part)
            updates, state = self.optimizer.update(found, state, parameters)
            return optax.apply_updates(parameters, updates), state, sums

        return program

    def was_finite(self, state: Any) -> bool:
        """See `Rule`."""
        return was_finite(state)


class MezoState(NamedTuple):
    """The state of MeZO.

    Attributes:
      update: number of finished updates.
      calls: number of calls since.
      slopes: for each direction, the sum of the slopes of these calls.
      finite: whether all of them are finite.
    """

    update: Int[Array, ""]
    calls: Int[Array, ""]
    slopes: Float[Array, " P"]
    finite: Bool[Array, ""]


@dataclass(frozen=True)
class Mezo:
    """MeZO (Malladi et al., arXiv 2305.17333): W ← W − η · slope · z for all matrices of the layers, in place.

    The slope is (L(W + εz) − L(W − εz)) / 2ε, over all sequences of the update. Directions are those of the engine of
    the scores (`Weights`): drawn again from their keys, and added to one layer at a time. So an update takes the memory
    of a forward pass. There is no optimiser.

    Attributes:
      rates: learning rate η of each update.
      calls: number of calls of an update.
      count: number of directions P of an update.
      epsilon: ε.
      seed: of the directions.
    """

    rates: optax.Schedule
    calls: int
    count: int
    epsilon: float
    seed: int

    def init(self, parameters: Matrices) -> MezoState:
        """See `Rule`."""
        return MezoState(jnp.int32(0), jnp.int32(0), jnp.zeros(self.count, jnp.float32), jnp.bool_(True))

    def was_finite(self, state: MezoState) -> bool:
        """See `Rule`."""
        return bool(state.finite)

    def program(self) -> Program:
        """See `Rule`."""
        return jax.jit(self._call, donate_argnums=(0, 1))

    def _call(
        self,
        matrices: Matrices,
        state: MezoState,
        decoder: Decoder,
        part: Part,
    ) -> tuple[Matrices, MezoState, Sums]:
        keys = self._keys(state.update)
        model = TrainedMatrices().computing(matrices, decoder)

        def pair(key: Key[Array, ""]) -> tuple[Array, Sums]:
            ahead, behind = (_sums(model, key, step, part) for step in (self.epsilon, -self.epsilon))
            slope = (objective.loss(ahead, part.weights) - objective.loss(behind, part.weights)) / (2 * self.epsilon)
            return part.scale * slope, jax.tree.map(lambda a, b: (a + b) / 2, ahead, behind)

        slopes, sums = jax.lax.map(pair, keys)
        slopes, calls = state.slopes + slopes, state.calls + 1
        is_finite, last = jnp.all(jnp.isfinite(slopes)), calls == self.calls
        steps = -jnp.asarray(self.rates(state.update)) * slopes / (self.calls * self.count)
        matrices = jax.lax.cond(last & is_finite, lambda: moved_in_place(matrices, keys, steps), lambda: matrices)
        after = MezoState(state.update + last, jnp.where(last, 0, calls), jnp.where(last, 0, slopes), is_finite)
        return matrices, after, jax.tree.map(jnp.mean, sums)

    def _keys(self, update: Int[Array, ""]) -> Key[Array, " P"]:
        key = jax.random.fold_in(directions.stream_key(self.seed, "mezo"), update)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.count))


def _sums(model: Decoder, key: Key[Array, ""], step: float, part: Part) -> Sums:
    """The losses at W + step · z."""

    def moved(block: Block, layer: Array, extra: None) -> Block:
        def new(name: str, matrix: Array) -> Array:
            return finite(jnp.float32(step))(matrix, partial(Weights().add, key=key, layer=layer, name=name))

        return replace_all_matrices(block, new)

    hidden = hidden_states(model, part.sequences.tokens, moved, None, "all")
    return objective.sums(model, hidden, part.sequences, part.teacher, part.weights.temperature)


def moved_in_place(matrices: Matrices, keys: Key[Array, " P"], steps: Float[Array, " P"]) -> Matrices:
    """Every matrix W + Σ step · z, one layer after the other, in the types of the matrices."""
    first, result = 0, []
    for run in matrices:
        depth = len(next(iter(run.values()))) if run else 0

        def layer(index: Array, run: dict[str, Array], first: int = first) -> dict[str, Array]:
            def moved(name: str, kernel: Array) -> Array:
                def add(number: Array, total: Array) -> Array:
                    return Weights().add(total, steps[number], keys[number], first + index, name)

                return jax.lax.fori_loop(0, len(steps), add, kernel.astype(jnp.float32)).astype(kernel.dtype)

            return {name: kernels.at[index].set(moved(name, kernels[index])) for name, kernels in run.items()}

        result.append(jax.lax.fori_loop(0, depth, layer, run))
        first += depth
    return result
