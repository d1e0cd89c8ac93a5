"""The tensors of a GGUF file as a source: under the names of a Hugging Face folder, decoded to plain numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert import gguf_config, gguf_experts, gguf_file, memory
from convert.families import FamilyTable
from convert.gguf_names import CHANGES
from convert.gguf_tensors import decode, stored_type
from minillm_jax.errors import InputError, warn

# The weights of a model folder in this format.
WEIGHTS = "model.gguf"

# Metadata that describe one file and not the model.
OF_ONE_FILE = frozenset(
    f"general.{name}"
    for name in (
        *("architecture", "type", "file_type", "quantization_version", "quantized_by", "alignment", "size_label"),
        "parameter_count",
    )
)

# The most bits of a weight for which the refit is said to fit the rounding. Q4_1 has 5, Q5_0 has 5.5.
FEW_BITS = 5.0


class GgufSource:
    """A tensor source: the tensors of a GGUF file, named as in a Hugging Face folder and decoded to plain numbers.

    Attributes:
      where: the file, for messages.
      dtype: type of the weights.
      table: the rules of the tensors of a model with experts; None for those of the family's folders.
    """

    def __init__(self, path: Path):
        self._file = gguf_file.open_gguf(path)
        self.where = str(self._file.path)
        arch = gguf_config.arch_of(self._file)
        self.table: FamilyTable | None = None if arch.experts is None else gguf_experts.table_of(arch.family)
        layers = gguf_config.layer_count(self._file)
        table, further = arch.names(layers), self._file.value("nextn_predict_layers", 0)
        # The layers behind the last one that predict further tokens are left out, as transformers does.
        left = tuple(f"blk.{layers + number}." for number in range(further))
        unknown = sorted(self._file.entries.keys() - table.keys() - {gguf_config.ROPE_FACTORS})
        unknown = [name for name in unknown if not name.startswith(left)]
        if unknown:
            raise InputError(
                f"{self.where}: unknown tensor {unknown[0]!r} of shape {self._file.entries[unknown[0]].shape}; the "
                f"architecture {arch.name} has no place for it"
            )
        self._stored = {name: (gguf, change) for gguf, (name, change) in table.items() if gguf in self._file.entries}
        self._head_size = gguf_config.head_size(self._file)
        self.dtype = stored_type(self._file)

    def names(self) -> Iterable[str]:
        """Names of all tensors, those of a Hugging Face folder."""
        return self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._file.entries[self._stored[name][0]].shape

    def read(self, name: str, allocate: memory.Allocate = memory.aligned_empty) -> np.ndarray:
        """Read and decode one tensor.

        Args:
          name: name of the tensor.
          allocate: gives the array for the decoded tensor.

        Raises:
          InputError: the file cannot be read, or the rows do not suit the head size.
        """
        gguf_name, change = self._stored[name]
        tensor = decode(self._file.entries[gguf_name])
        if change is not None:
            tensor = self._changed(tensor, change, gguf_name)
        result = allocate(tensor.shape, np.dtype(self.dtype))
        memory.copy_layout(result, tensor)
        return result

    def warn_of_rounding(self) -> None:
        """Issues an `InputWarning` where most weights of the layers have few bits."""
        layers = [entry for name, entry in self._file.entries.items() if name.startswith("blk.")]
        few = [entry for entry in layers if 8 * entry.size <= FEW_BITS * np.prod(entry.shape)]
        if 2 * sum(np.prod(entry.shape) for entry in few) > sum(np.prod(entry.shape) for entry in layers):
            kinds = ", ".join(sorted({entry.type for entry in few}))
            warn(
                f"{self.where}: the weights are rounded to about four bits ({kinds}), and a refit fits the noise of "
                "the rounding too; prune the model that was quantised where it can be had"
            )

    def _changed(self, tensor: np.ndarray, change: str, name: str) -> np.ndarray:
        try:
            return CHANGES[change][1](tensor, self._head_size)
        except ValueError as error:
            raise InputError(
                f"{self.where}: tensor {name!r} of shape {tensor.shape} has no rows for heads of {self._head_size}"
            ) from error


def weights_of(folder: Path) -> Path:
    """The GGUF file of a folder: `WEIGHTS` in it, or the file that it is a link to in a temporary folder.

    The files of a model in several files are found by their names, so only this link is followed.
    """
    path = folder / WEIGHTS
    target = path.readlink() if path.is_symlink() else path
    return target if target.is_absolute() else path


def carried_metadata(folder: Path) -> dict[str, Any] | None:
    """The metadata of the GGUF file of a folder that another file keeps: the tokenizer, the licence, who made it.

    None where the folder has no GGUF file.
    """
    if not (folder / WEIGHTS).is_file():
        return None
    metadata = gguf_file.open_gguf(weights_of(folder)).metadata
    return {
        key: value
        for key, value in metadata.items()
        if key.startswith(("tokenizer.", "general.")) and key not in OF_ONE_FILE
    }
