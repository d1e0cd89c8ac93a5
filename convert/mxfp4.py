"""Checkpoints whose experts are stored in four bits with one scale per 32 numbers, as gpt-oss is published.

A tensor `name` of experts [X, I, O] is stored transposed in two of eight bits. `name_blocks` [X, O, I / 32, 16] holds
two numbers in each byte, the first in the low half. `name_scales` [X, O, I / 32] holds one exponent for every 32
numbers. A number is its value in `VALUES` times 2^(exponent − 127) (OCP Microscaling Formats: MXFP4, E2M1 with E8M0).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import memory
from convert.sources import FLOATS, SafetensorsFolder, has_safetensors
from minillm_jax.errors import InputError

# Name in a safetensors header → name in NumPy.
BYTES = {"U8": "uint8"}

BLOCKS, SCALES = "_blocks", "_scales"

# Numbers of a block, and the bytes that hold them.
NUMBERS, PACKED = 32, 16

BIAS = 127

# Value of each of the sixteen patterns of four bits: sign, two bits of exponent, one bit of fraction.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def is_mxfp4(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration says that its experts are stored in this way; that of gpt-oss alone can."""
    settings = raw.get("quantization_config")
    named = isinstance(settings, Mapping) and settings.get("quant_method") == "mxfp4"
    return named and raw.get("model_type") == "gpt_oss"


class Mxfp4Folder:
    """A tensor source that multiplies the experts by their scales as it reads them."""

    def __init__(self, folder: Path, dtype: str):
        """The tensors of a folder.

        Args:
          folder: the folder.
          dtype: type of the experts that are multiplied out.

        Raises:
          InputError: the folder has no safetensors files, or they are damaged.
        """
        if not has_safetensors(folder):
            raise InputError(f"{folder}: weights of four bits must be stored as safetensors")
        self.where = str(folder)
        self._stored, self._dtype = SafetensorsFolder(folder, types=FLOATS | BYTES), np.dtype(dtype)
        self._packed = {name.removesuffix(BLOCKS) for name in self._stored.names() if name.endswith(BLOCKS)}

    def names(self) -> Iterable[str]:
        """Names of all tensors, of packed ones without `_blocks` and `_scales`."""
        plain = [name for name in self._stored.names() if not name.endswith((BLOCKS, SCALES))]
        return [*plain, *sorted(self._packed)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor.

        Raises:
          InputError: the scales of packed numbers are missing, or do not fit them.
        """
        if name not in self._packed:
            return self._stored.shape(name)
        blocks, names = self._stored.shape(name + BLOCKS), set(self._stored.names())
        scales = self._stored.shape(name + SCALES) if name + SCALES in names else None
        if len(blocks) != 4 or blocks[-1] != PACKED or scales != blocks[:-1]:
            raise InputError(
                f"{self.where}: packed numbers {name + BLOCKS!r} of shape {blocks} need {PACKED} bytes a block and the "
                f"scales {name + SCALES!r} of shape {blocks[:-1]}, found {'none' if scales is None else scales}"
            )
        experts, outputs, count, _ = blocks
        return experts, count * NUMBERS, outputs

    def read(self, name: str, allocate: memory.Allocate) -> np.ndarray:
        """One tensor; packed numbers are multiplied out, one expert at a time.

        Raises:
          InputError: as for `shape`, or the file has changed since its header was read.
        """
        if name not in self._packed:
            return self._stored.read(name, allocate)
        tensor = allocate(self.shape(name), self._dtype)
        packed, scales = self._stored.read(name + BLOCKS), self._stored.read(name + SCALES)
        for expert, (blocks, exponents) in enumerate(zip(packed, scales, strict=True)):
            numbers = VALUES[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*exponents.shape, NUMBERS)
            scaled = np.ldexp(numbers, exponents[..., None].astype(np.int32) - BIAS)
            tensor[expert] = scaled.reshape(len(scaled), -1).T.astype(self._dtype)
        return tensor
