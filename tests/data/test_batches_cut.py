"""The batches of all windows: their sizes, and their order."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from minillm_jax.data.batches import Batches


def check_batches(devices: int) -> None:
    """Asserts that batches cover all windows in order, in at most two sizes, and within the limit of tokens."""
    mesh = jax.make_mesh((devices, 1), ("data", "model")) if devices > 1 else None
    for count in range(1, 20):
        windows = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
        for tokens_per_batch in (1, 4, 9, 13, 1000):
            batches = list(Batches(windows, mesh, tokens_per_batch))
            np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), windows)
            np.testing.assert_array_equal(np.concatenate([batch.numbers for batch in batches]), np.arange(count))
            sizes = [len(batch.numbers) for batch in batches]
            assert max(sizes) * 4 <= devices * max(tokens_per_batch, 4)
            # On several devices, the last batch may be a remainder that does not divide by them.
            assert len({size for size in sizes if size % devices == 0}) <= 2
            assert all(size % devices == 0 for size in sizes[:-1])


def test_batches_cover_all_windows_in_at_most_two_sizes() -> None:
    check_batches(devices=1)


def test_batches_on_three_devices_divide_by_the_devices() -> None:
    """In a process with three devices of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": flags}
    environment |= {"JAX_PLATFORMS": "cpu"}
    program = "from tests.data.test_batches_cut import check_batches; check_batches(3)"
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
