"""A loaded model: the decoder, and what a folder of weights says besides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.model.decoder import Decoder


@dataclass(frozen=True)
class Model:
    """What `load` returns and `save` takes.

    Attributes:
      decoder: the weights, as a pytree that computes.
      raw_config: config.json as it was read; writing updates sizes, types and rotary settings and keeps the rest.
      folder: where the model lies; tokenizer and generation settings are copied from here.
      name: what it was loaded by, a path or a Hub id.
      record: how it was pruned (what pruning.json says), None for a dense model.
    """

    decoder: Decoder
    raw_config: dict[str, Any]
    folder: Path
    name: str
    record: dict[str, Any] | None = None
