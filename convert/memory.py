"""Moving weights through the host's memory: aligned buffers, fast transposition, a quick look for NaN."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minillm_jax.errors import InputError

# Gives memory for a shape and a type.
Allocate = Callable[[Sequence[int], np.dtype], np.ndarray]

ALIGNMENT = 64  # bytes; what JAX asks for to take an array on the CPU as it is
TILE = 256  # rows and columns of what is transposed at once: it stays in a core's second-level cache
CHUNK = 1 << 16  # values that are checked at once: they stay in the cache for the second look
WORTH_SHARING = 1 << 22  # bytes for which threads are started
WORKERS = min(8, os.cpu_count() or 1)


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of any values that `jax.device_put` takes on the CPU without copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Scratch:
    """Memory that one tensor after the other is read into; new memory costs as much as reading."""

    def __init__(self):
        self._memory = np.empty(0, np.uint8)

    def allocate(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array of any values, in place of the one before."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.size < size:
            self._memory = np.empty(0, np.uint8)  # the old one goes before the new one comes
            self._memory = aligned_empty((size,), np.dtype(np.uint8))
        return self._memory[:size].view(dtype).reshape(shape)


def as_integers(array: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned numbers of the same width: NumPy moves and checks bfloat16 slowly."""
    return array.view(f"u{array.itemsize}")


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


def copy_layout(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, fast where one is stored transposed to the other.

    Args:
      target: any shape.
      source: the same shape in another order of memory, and perhaps another type.
    """
    target, source = _merge_axes(target, source)
    axis = int(np.argmax(target.shape)) if target.ndim else 0

    def copy(start: int, stop: int) -> None:
        part = (slice(None),) * axis + (slice(start, stop),)
        _copy_part(target[part], source[part])

    if target.ndim:
        share_work(copy, target.shape[axis], target.nbytes, TILE)
    else:
        _assign(target, source)


def _merge_axes(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape without axes of size 1, and with neighbours as one axis where both allow it."""
    target, source = target.squeeze(), source.squeeze()
    shape = list(target.shape[:1])
    for axis in range(1, target.ndim):
        size = target.shape[axis]
        if all(array.strides[axis - 1] == size * array.strides[axis] for array in (target, source)):
            shape[-1] *= size
        else:
            shape.append(size)
    return target.reshape(shape), source.reshape(shape)


def _copy_part(target: np.ndarray, source: np.ndarray) -> None:
    """Copy by tiles along the two axes whose neighbours lie side by side in the one array and in the other."""
    along, across = (int(np.argmin(np.abs(array.strides))) for array in (target, source))
    if along == across:
        _assign(target, source)
        return
    target, source = (np.moveaxis(array, (along, across), (-1, -2)) for array in (target, source))
    # Rows a power of two apart would fall on the same lines of the cache.
    scratch = np.empty((TILE, TILE + ALIGNMENT // target.itemsize), target.dtype)
    for place in np.ndindex(target.shape[:-2]):
        for i in range(0, target.shape[-2], TILE):
            for j in range(0, target.shape[-1], TILE):
                window = (*place, slice(i, i + TILE), slice(j, j + TILE))
                rows = source[window].T
                tile = scratch[: rows.shape[0], : rows.shape[1]]
                _assign(tile, rows)
                _assign(target[window], tile.T)


def _assign(target: np.ndarray, source: np.ndarray) -> None:
    if target.dtype == source.dtype:
        target, source = as_integers(target), as_integers(source)
    with np.errstate(over="ignore"):  # values that leave the type are infinite, which is looked for afterwards
        target[...] = source


def share_work(work: Callable[[int, int], None], count: int, size: int, grain: int = 1) -> None:
    """Call `work(start, stop)` for parts of `range(count)`, in threads when there is much to do.

    Args:
      work: something that NumPy or the system does, without Python's lock.
      count: all there is.
      size: its bytes.
      grain: what `start` is a multiple of.
    """
    threads = min(WORKERS, size // WORTH_SHARING, -(-count // grain))
    if threads < 2:
        work(0, count)
        return
    step = -(-count // (threads * grain)) * grain
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, start, min(start + step, count)) for start in range(0, count, step)]:
            done.result()


def check_finite(array: np.ndarray, name: str, where: str, kind: str = "") -> None:
    """Whether a contiguous array holds numbers only.

    Raises:
      InputError: it holds NaN or infinite values; `kind` says in which type.
    """
    bits = as_integers(array).reshape(-1)
    signed = bits.view(f"i{array.itemsize}")
    # As whole numbers of either sign, NaN and infinities are the largest: infinity, without a sign and with it, and up.
    positive, negative = as_integers(np.asarray([np.inf, -np.inf], array.dtype))

    def check(start: int, stop: int) -> None:
        for first in range(start, stop, CHUNK):
            part = slice(first, min(first + CHUNK, stop))
            if signed[part].max() >= positive or bits[part].max() >= negative:
                raise InputError(f"{where}: tensor {name!r} holds NaN or infinite values{kind}")

    share_work(check, bits.size, array.nbytes)
