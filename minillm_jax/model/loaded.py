"""A loaded model: the decoder with its configuration, its folder and its pruning record."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.model.decoder import Decoder


@dataclass(frozen=True)
class Model:
    """A model, as `load` returns and `save` takes it.

    Attributes:
      decoder: the weights and the forward pass.
      raw_config: config.json as it was read; `save` updates sizes, types and rotary settings and copies all other keys.
      folder: folder of the model; `save` copies the files beside the weights from it.
      name: the path or Hub id that was loaded.
      record: the content of pruning.json; None for a dense model.
      revision: the commit of the weights on the Hub; None for a local folder.
    """

    decoder: Decoder
    raw_config: dict[str, Any]
    folder: Path
    name: str
    record: dict[str, Any] | None = None
    revision: str | None = None

    @property
    def text_values(self) -> dict[str, Any]:
        """The values of config.json; of a vision-language model also those under `text_config`."""
        inner = self.raw_config.get("text_config")
        return {**inner, **self.raw_config} if isinstance(inner, Mapping) else self.raw_config
