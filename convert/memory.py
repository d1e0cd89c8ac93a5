"""Host memory of the converter: aligned buffers, fast transposition, the check for NaN and infinite values."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minillm_jax.errors import InputError

# An allocator: shape and type → an array of arbitrary values.
Allocate = Callable[[Sequence[int], np.dtype], np.ndarray]

ALIGNMENT = 64  # bytes; the alignment that JAX requires to alias a NumPy buffer on the CPU
TILE = 256  # rows and columns of a transposed tile, which fits into a core's second-level cache
CHUNK = 1 << 16  # values of a chunk that is checked for NaN; the second comparison finds it in the cache
BYTES_PER_THREAD = 1 << 22  # least amount of work that pays for a thread
MAX_THREADS = min(8, os.cpu_count() or 1)


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of arbitrary values that `jax.device_put` aliases on the CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


class Scratch:
    """A buffer that is reused for one tensor after another, because new memory costs as much as reading."""

    def __init__(self):
        self._memory = np.empty(0, np.uint8)

    def allocate(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array of arbitrary values in the buffer; it overwrites the array of the previous call."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.size < size:
            self._memory = np.empty(0, np.uint8)  # frees the old buffer before the new one is allocated
            self._memory = aligned_empty((size,), np.dtype(np.uint8))
        return self._memory[:size].view(dtype).reshape(shape)


def as_integers(array: np.ndarray) -> np.ndarray:
    """The bits of an array as unsigned integers of the same width, because NumPy copies bfloat16 slowly."""
    return array.view(f"u{array.itemsize}")


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


def copy_layout(
    target: np.ndarray,
    source: np.ndarray,
    *,
    max_threads: int = MAX_THREADS,
    bytes_per_thread: int = BYTES_PER_THREAD,
) -> None:
    """`target[...] = source`, fast also where the two memory layouts are transposes of each other.

    Args:
      target: array of any shape.
      source: array of the same shape, whose memory order and type may differ.
      max_threads: see `share_work`.
      bytes_per_thread: see `share_work`.
    """
    target, source = _merge_axes(target, source)
    axis = int(np.argmax(target.shape)) if target.ndim else 0

    def copy(start: int, stop: int) -> None:
        part = (slice(None),) * axis + (slice(start, stop),)
        _copy_part(target[part], source[part])

    if target.ndim:
        share_work(
            copy,
            target.shape[axis],
            target.nbytes,
            TILE,
            max_threads=max_threads,
            bytes_per_thread=bytes_per_thread,
        )
    else:
        _assign(target, source)


def _merge_axes(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views of two arrays of equal shape without axes of size 1; axes that are contiguous in both are merged."""
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
    """Copy tile by tile over two axes: the fastest-varying axis of the target and that of the source."""
    target_axis, source_axis = (int(np.argmin(np.abs(array.strides))) for array in (target, source))
    if target_axis == source_axis:
        _assign(target, source)
        return
    target, source = (np.moveaxis(array, (target_axis, source_axis), (-1, -2)) for array in (target, source))
    # The padding of the rows keeps them off the same cache lines, where rows a power of two apart would fall.
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
    with np.errstate(over="ignore"):  # a value out of range becomes infinite, and `check_finite` reports it
        target[...] = source


def share_work(
    work: Callable[[int, int], None],
    count: int,
    size: int,
    grain: int = 1,
    *,
    max_threads: int = MAX_THREADS,
    bytes_per_thread: int = BYTES_PER_THREAD,
) -> None:
    """Call `work(start, stop)` for parts of `range(count)`, in threads where the work is large enough.

    Args:
      work: function that releases Python's lock, as NumPy and file reads do.
      count: number of items.
      size: size of all items in bytes.
      grain: every `start` is a multiple of it.
      max_threads: largest number of threads.
      bytes_per_thread: least number of bytes for which a thread is started.
    """
    threads = min(max_threads, size // bytes_per_thread, -(-count // grain))
    if threads < 2:
        work(0, count)
        return
    step = -(-count // (threads * grain)) * grain
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, start, min(start + step, count)) for start in range(0, count, step)]:
            future.result()


def check_finite(array: np.ndarray, name: str, where: str, kind: str = "") -> None:
    """Check that a contiguous array holds finite values only.

    Args:
      array: array of a floating-point type.
      name: name of the tensor, for the message.
      where: file or folder of the tensor, for the message.
      kind: end of the message that names the type after a cast, ` as float16` for example.

    Raises:
      InputError: the array holds NaN or infinite values.
    """
    bits = as_integers(array).reshape(-1)
    signed = bits.view(f"i{array.itemsize}")
    # Bits of positive values compare as signed integers, bits of negative values as unsigned integers. In each
    # comparison infinity and NaN are the largest.
    positive, negative = as_integers(np.asarray([np.inf, -np.inf], array.dtype))

    def check(start: int, stop: int) -> None:
        for first in range(start, stop, CHUNK):
            part = slice(first, min(first + CHUNK, stop))
            if signed[part].max() >= positive or bits[part].max() >= negative:
                raise InputError(f"{where}: tensor {name!r} holds NaN or infinite values{kind}")

    share_work(check, bits.size, array.nbytes)
