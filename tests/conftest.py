"""Settings of all tests: strict JAX, fast compilation, checks of array types and shapes, no network."""

import atexit
import importlib
import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Compilation for the CPU takes a quarter less time with this flag. Another version, and libtpu, would end the process.
if version("jaxlib") == "0.10.2" and importlib.util.find_spec("libtpu") is None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

# All test processes, and those that tests start, share compiled programs: a sixth of the time goes into programs that
# another test has compiled. The first process makes the folder; the others inherit its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="minillm-jax-tests-")
    os.environ |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from collections.abc import Callable, Iterator

import jax
import pytest
import torch
from beartype import beartype
from jaxtyping import install_import_hook


def check_types(function: Callable) -> Callable:
    """A function with checks of its arguments and its result at every call; nested functions are unchanged.

    A nested function is defined again at every call of the outer function. Its checks would be built every time, which
    took more than a third of the time of the parity tests of `test_decoder.py`.
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)


jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(("minillm_jax", "convert"), "tests.conftest.check_types")

# Two test processes run on two cores; more threads would only wait for each other.
torch.set_num_threads(1)

# The statements of these modules hold for code that is compiled with optimizations, as users compile it.
OPTIMISED = ("test_estimate", "test_directions", "test_memory", "test_real_models")


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without optimizations in most modules, because most programs of the tests run once."""
    quick = request.module.__name__.split(".")[-1] not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Folders whose modules take longest. They start first, so that no long module is left for one process at the end.
LONG = ("devices", "scoring", "pruning", "convert", "cli")


SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow.txt. Sorts the modules by the place of their folder in `LONG`; all others come last."""
    slow = {line for line in SLOW.read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if not slow.isdisjoint((item.nodeid, item.nodeid.partition("[")[0])):
            item.add_marker("slow")
    ranks = {folder: rank for rank, folder in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(LONG)))


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Modules of `bench` by name. They import each other as they do when a script runs."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench")
        yield importlib.import_module
    torch.set_num_threads(threads)
