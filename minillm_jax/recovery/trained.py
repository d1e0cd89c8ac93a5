"""What a recovery trains: an adapter beside the decoder, or some of the decoder's own arrays.

Both are a pytree of float32 arrays, the parameters. A `Trained` says how the model computes with them. The decoder
itself is an argument without a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key

from minillm_jax.model import axis_table
from minillm_jax.model.build import with_runs
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.modules import PRODUCT, Block
from minillm_jax.model.padded_runs import one_run, worth_padding
from minillm_jax.model.tree import all_matrices, named_arrays, replace_all_matrices
from minillm_jax.recovery import adapter as adapters
from minillm_jax.recovery.adapter import Lora

Parameters = Any

# What reverse mode keeps of the activations of a layer -> policy of `jax.checkpoint`: its input; the outputs of its
# linear maps too; all.
KEPT: dict[str, Any] = {
    "stream": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "all": None,
}


@runtime_checkable
class Trained(Protocol):
    """The methods that the training loop calls."""

    def initial(self, decoder: Decoder, seed: int) -> Parameters:
        """The parameters before the first update, which change nothing."""
        ...

    def computing(self, parameters: Parameters, decoder: Decoder) -> Decoder:
        """The decoder whose embedding and head the model computes with."""
        ...

    def hidden(
        self, parameters: Parameters, decoder: Decoder, tokens: Int[Array, "B T"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T E"]:
        """The input of the head; the key is that of the dropout, None in evaluation."""
        ...

    def result(self, parameters: Parameters, decoder: Decoder) -> Decoder:
        """The recovered decoder, in the types of the decoder."""
        ...


@dataclass(frozen=True)
class TrainedAdapter:
    """A low-rank adapter.

    Attributes:
      lora: its shape.
      activations: see `hidden_states`.
      start: the adapter before the first update; None for a new one.
    """

    lora: Lora
    activations: str = "products"
    start: adapters.Adapter | None = field(default=None, compare=False)

    def initial(self, decoder: Decoder, seed: int) -> adapters.Adapter:
        """See `Trained`."""
        if self.start is not None:
            return jax.tree.map(jnp.copy, self.start)
        return adapters.initial(decoder, self.lora, seed)

    def computing(self, parameters: adapters.Adapter, decoder: Decoder) -> Decoder:
        """See `Trained`: the decoder itself."""
        return decoder

    def hidden(
        self, parameters: adapters.Adapter, decoder: Decoder, tokens: Int[Array, "B T"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T E"]:
        """See `Trained`."""

        def with_adapter(block: Block, layer: Array, factors: Any) -> Block:
            return adapters.adapted(block, factors, self.lora, key, layer)

        pad = partial(adapters.one_run, decoder.runs)
        return hidden_states(decoder, tokens, with_adapter, parameters, self.activations, pad)

    def result(self, parameters: adapters.Adapter, decoder: Decoder) -> Decoder:
        """See `Trained`."""
        return adapters.merge(decoder, parameters, self.lora)


@dataclass(frozen=True)
class TrainedArrays:
    """Arrays of the decoder, as float32 copies that are rounded to the decoder's types in every forward pass.

    Attributes:
      which: `all`, `norms`, or `all-small` (norms and biases).
      activations: see `hidden_states`.
    """

    which: str = "all"
    activations: str = "products"

    def trains(self, path: str) -> bool:
        """Whether an array is trained, by its path."""
        if axis_table.is_data(path):
            return False
        # `choice_bias` moves the choice of experts alone, where the loss has no slope.
        bias = path.endswith("bias") and not path.endswith("choice_bias")
        return self.which == "all" or "norm" in path or (self.which == "all-small" and bias)

    def initial(self, decoder: Decoder, seed: int) -> dict[str, Array]:
        """See `Trained`."""
        return {
            path: jnp.array(array, jnp.float32)  # a copy in any type, because the loop gives its memory away
            for path, array in named_arrays(decoder)
            if self.trains(path)
        }

    def computing(self, parameters: dict[str, Array], decoder: Decoder) -> Decoder:
        """See `Trained`."""

        def leaf(path: jax.tree_util.KeyPath, array: Array) -> Array:
            trained = parameters.get(axis_table.array_path(path))
            return array if trained is None else trained.astype(array.dtype)

        return jax.tree_util.tree_map_with_path(leaf, decoder)

    def hidden(
        self, parameters: dict[str, Array], decoder: Decoder, tokens: Int[Array, "B T"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T E"]:
        """See `Trained`. There is no dropout."""
        return hidden_states(self.computing(parameters, decoder), tokens, None, None, self.activations)

    def result(self, parameters: dict[str, Array], decoder: Decoder) -> Decoder:
        """See `Trained`."""
        return self.computing(parameters, decoder)


# For each run of the decoder: name of a matrix -> the matrix in all layers of the run.
Matrices = list[dict[str, Array]]


@dataclass(frozen=True)
class TrainedMatrices:
    """All matrices of the layers, in their own types. No gradient is taken by them (`rules.Mezo`)."""

    def initial(self, decoder: Decoder, seed: int) -> Matrices:
        """See `Trained`."""
        return [{name: jnp.array(matrix[...]) for name, matrix in all_matrices(run).items()} for run in decoder.runs]

    def computing(self, parameters: Matrices, decoder: Decoder) -> Decoder:
        """See `Trained`."""
        pairs = zip(decoder.runs, parameters, strict=True)
        return with_runs(decoder, [replace_all_matrices(run, lambda name, _, new=new: new[name]) for run, new in pairs])

    def hidden(
        self, parameters: Matrices, decoder: Decoder, tokens: Int[Array, "B T"], key: Key[Array, ""] | None
    ) -> Float[Array, "B T E"]:
        """See `Trained`. There is no dropout."""
        return hidden_states(self.computing(parameters, decoder), tokens, activations="all")

    def result(self, parameters: Matrices, decoder: Decoder) -> Decoder:
        """See `Trained`."""
        return self.computing(parameters, decoder)


def hidden_states(
    decoder: Decoder,
    tokens: Int[Array, "B T"],
    changed: Callable[[Block, Array, Any], Block] | None = None,
    per_layer: Any = None,
    activations: str = "products",
    pad: Callable[[Any], Any] | None = None,
) -> Float[Array, "B T E"]:
    """The input of the head, with changed layers.

    Args:
      decoder: the model.
      tokens: token ids.
      changed: block of one layer, index of the layer, its slice of `per_layer` -> block that is computed.
      per_layer: see `scan_layers`.
      activations: what reverse mode keeps of a layer's activations (`KEPT`); it computes the others again.
      pad: `per_layer` -> that of one run, where all runs are padded to one (`padded_runs`).
    """
    runs = decoder.runs
    if worth_padding(runs):
        runs, per_layer = one_run(runs), per_layer if pad is None else pad(per_layer)
    angles = rotary_angles(decoder, tokens.shape[1])

    def step(x: Array, block: Block, layer: Array, extra: Any) -> tuple[Array, None]:
        computed = block if changed is None else changed(block, layer, extra)
        return apply_layer(computed, decoder.config, x, angles)[0], None

    kept = step if activations == "all" else jax.checkpoint(step, prevent_cse=False, policy=KEPT[activations])
    x, _ = scan_layers(runs, kept, embed(decoder, tokens), per_layer)
    return finish(decoder, x)
