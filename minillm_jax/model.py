"""A loaded model: the decoder, and what a folder of weights says besides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.decoder import Decoder


@dataclass(frozen=True)
class Model:
    """What `load` returns and `save` takes.

    Attributes:
      decoder: the weights, as a pytree that computes.
      raw_config: config.json as it was read; writing changes only what pruning changed.
      folder: where the model came from; tokenizer and generation settings are copied from here.
      record: how it was pruned (what pruning.json will say), None for a dense model.
    """

    decoder: Decoder
    raw_config: dict[str, Any]
    folder: Path
    record: dict[str, Any] | None = None
