"""Checkpoints whose matrices are stored in eight bits with one scale per block, as Qwen 3 and DeepSeek 3 publish them.

A matrix `name.weight` is of type float8 (e4m3), and `name.weight_scale_inv` holds one number for every block of its
rows and columns, or one number for the whole matrix (Ministral 3). The matrix is the product of both. The blocks at the
ends are smaller where the sizes do not divide. Scales of the activations are not read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import memory
from convert.sources import FLOATS, SafetensorsFolder, has_safetensors
from minillm_jax.errors import InputError

# Name in a safetensors header → name in NumPy.
FLOAT8 = {"F8_E4M3": "float8_e4m3fn"}

SCALE = "_scale_inv"
OF_ACTIVATIONS = ".activation_scale"

# The block of a matrix with one scale.
WHOLE = (0, 0)

# Rows that are multiplied at a time, where there are no blocks.
ROWS = 1024


def blocks_of(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, for a configuration of scaled weights of float8; None for every other one.

    `WHOLE` stands for one scale for each matrix.
    """
    settings = raw.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "fp8":
        return None
    size = settings.get("weight_block_size", [])
    if size is None:
        return WHOLE if settings.get("fmt", "e4m3") == "e4m3" else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        return None
    return (size[0], size[1]) if settings.get("fmt", "e4m3") == "e4m3" else None


class BlockScaledFolder:
    """A tensor source that multiplies matrices of float8 by their scales as it reads them."""

    def __init__(self, folder: Path, blocks: tuple[int, int], dtype: str):
        """The tensors of a folder.

        Args:
          folder: the folder.
          blocks: rows and columns of a block.
          dtype: type of the matrices that are multiplied out.

        Raises:
          InputError: the folder has no safetensors files, or they are damaged.
        """
        if not has_safetensors(folder):
            raise InputError(f"{folder}: weights in blocks of float8 must be stored as safetensors")
        self.where = str(folder)
        self._stored = SafetensorsFolder(folder, types=FLOATS | FLOAT8)
        self._blocks, self._dtype = blocks, np.dtype(dtype)

    def names(self) -> Iterable[str]:
        """Names of all tensors without the scales."""
        return [name for name in self._stored.names() if not name.endswith((SCALE, OF_ACTIVATIONS))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
          InputError: the scales of a matrix of float8 are missing, or do not fit it.
        """
        shape = self._stored.shape(name)
        if self._stored.type_of(name) in FLOATS:
            return shape
        scale = name + SCALE
        found = self._stored.shape(scale) if scale in self._stored.names() else None
        if self._blocks == WHOLE:
            expected = found if found in ((1,), (1, 1)) else ()
        else:
            expected = tuple(-(-size // block) for size, block in zip(shape, self._blocks, strict=False))
        if len(shape) != 2 or found != expected:
            raise InputError(
                f"{self.where}: the scales {scale!r} of a float8 tensor of shape {shape} must have shape {expected}, "
                f"found {'none' if found is None else found}"
            )
        return shape

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """One tensor, multiplied by its scales if it is of float8.

        Raises:
          InputError: as for `shape`, or the file has changed since its header was read.
        """
        shape = self.shape(name)
        if self._stored.type_of(name) in FLOATS:
            return self._stored.read(name, allocate)
        values, scales = self._stored.read(name), self._stored.read(name + SCALE).astype(np.float32)
        tensor = allocate(shape, self._dtype)
        rows, columns = self._blocks
        if self._blocks == WHOLE:
            rows, wide = ROWS, np.broadcast_to(scales.reshape(1, 1), (-(-shape[0] // ROWS), 1))
        else:
            wide = np.repeat(scales, columns, axis=1)[:, : shape[1]]
        for block, start in enumerate(range(0, shape[0], rows)):
            part = slice(start, start + rows)
            tensor[part] = (values[part].astype(np.float32) * wide[block]).astype(self._dtype)
        return tensor
