"""Speed, memory and size of models in folders, each in a process of its own; the command `bench`.

All processes load their model first. Then they take turns, one round each, so that a machine whose speed changes treats
all models alike. On a platform whose devices belong to one process (TPU), a model runs all its rounds before the next
is loaded.
"""

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from minillm_jax.api import describe, load
from minillm_jax.devices.memory import peak_bytes, process_peak
from minillm_jax.errors import InputError, cause
from minillm_jax.evaluation.speed import Engine, Load, Ours, Round, Speed, one_round, speed_of
from minillm_jax.model.decoder import learned_positions
from minillm_jax.model.tree import parameter_count

OURS, TORCH = "minillm-jax", "transformers"

# Endings of files that hold weights.
WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Timed:
    """The figures of one model in one library.

    Attributes:
      model: path or Hub id.
      library: `minillm-jax` or `transformers`.
      parameters: number of parameters.
      disk: bytes of its files of weights.
      load_seconds: from the start of loading until the weights are in memory.
      peak_bytes: the most memory of its process, or of its device.
      speed: medians over the rounds, without compilation.
    """

    model: str
    library: str
    parameters: int
    disk: int
    load_seconds: float
    peak_bytes: int
    speed: Speed


class Torch:
    """A model of transformers as an engine, with its own key/value cache."""

    def __init__(self, model: Any) -> None:
        import torch

        self._torch, self._model = torch, model
        self._cache: Any = None
        self._token: Any = None

    def read(self, prompts: Int[np.ndarray, "B T"], size: int) -> None:
        """See `Engine`."""
        self._cache = None
        self._advance(self._torch.tensor(prompts, dtype=self._torch.long, device=self._model.device))

    def more(self, count: int) -> None:
        """See `Engine`."""
        for _ in range(count):
            self._advance(self._token)

    @property
    def last(self) -> Int[np.ndarray, " B"]:
        """The last token of every prompt."""
        assert self._token is not None, "a prompt was read"
        return self._token[:, 0].numpy(force=True).astype(np.int32)

    def _advance(self, ids: Any) -> None:
        with self._torch.inference_mode():
            found = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._token = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
        if self._model.device.type == "cuda":
            self._torch.cuda.synchronize()


def check(models: Sequence[str], what: Load, rounds: int, libraries: Sequence[str]) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
      InputError: a number is out of its range, a library is missing, a model cannot be read, or has too few positions.
    """
    for flag, value in (("--prompt", what.prompt), ("--tokens", what.tokens - 1), ("--rounds", rounds), *_sizes(what)):
        if value < 1:
            raise InputError(f"{flag}: expected a whole number of at least {2 if flag == '--tokens' else 1}")
    if TORCH in libraries and importlib.util.find_spec("torch") is None:
        raise InputError("--torch needs PyTorch: pip install 'minillm-jax[torch]'")
    for name in models:
        limit = learned_positions(describe(name).decoder)
        if limit is not None and what.size > limit:
            raise InputError(f"{name}: {what.size} tokens are too long: the model has {limit} learned positions")


def _sizes(what: Load) -> list[tuple[str, int]]:
    return [("--batch-sizes", batch) for batch in what.batches or (0,)]


def time_models(
    models: Sequence[str],
    what: Load,
    rounds: int = 3,
    libraries: Sequence[str] = (OURS,),
    dtype: str | None = None,
    told: Callable[[int, int], None] | None = None,
) -> list[Timed]:
    """The figures of several models, in the order of the models, libraries within.

    Args:
      models: paths or Hub ids.
      what: what is timed.
      rounds: number of rounds whose medians count; a round before them compiles.
      libraries: `minillm-jax`, `transformers`, or both.
      dtype: type of the weights; the stored type by default.
      told: called with the number of rounds done, and of all.

    Raises:
      InputError: a model cannot be loaded, or a process ends early.
    """
    asked = [(model, library) for model in models for library in libraries]
    done, found = 0, []
    # This process must not ask JAX for its platform: it would hold the devices of a TPU from then on.
    together = importlib.util.find_spec("libtpu") is None
    for part in [asked] if together else [[one] for one in asked]:
        with ExitStack() as stack:
            workers = [stack.enter_context(_worker(model, library, what, dtype)) for model, library in part]
            loaded = [worker.next() for worker in workers]
            taken: list[list[Round]] = [[] for _ in workers]
            for _ in range(rounds + 1):
                for worker, its in zip(workers, taken, strict=True):
                    its.append(worker.ask("round"))
                    done += 1
                    if told is not None:
                        told(done, (rounds + 1) * len(asked))
            for (model, library), worker, first, its in zip(part, workers, loaded, taken, strict=True):
                found.append(
                    Timed(model, library, *first, peak_bytes=worker.ask("peak"), speed=speed_of(its[1:], what))
                )
    return found


class _Worker:
    """The other end of a process that holds a model."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def ask(self, word: str) -> Any:
        """The answer of the process."""
        self._connection.send(word)
        return self.next()

    def next(self) -> Any:
        """The next object that the process sends.

        Raises:
          InputError: it sends an error, or has ended.
        """
        try:
            answer = self._connection.recv()
        except EOFError:
            raise InputError(f"{self._model}: its process ended early; is there memory for all models?") from None
        if isinstance(answer, Exception):
            raise InputError(f"{self._model}: {cause(answer)}") from answer
        return answer


@contextmanager
def _worker(model: str, library: str, what: Load, dtype: str | None) -> Iterator[_Worker]:
    """A process with a model, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=serve, args=(its, model, library, what, dtype), daemon=True)
    # Several processes share a GPU only if none of these takes most of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    process.start()
    its.close()
    try:
        yield _Worker(ours, model)
    finally:
        ours.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()


def serve(connection: Connection, model: str, library: str, what: Load, dtype: str | None) -> None:
    """Load a model, then answer `round` with a `Round` and `peak` with bytes, until the connection ends."""
    try:
        started = time.perf_counter()
        engine, parameters, disk, vocabulary = (_ours if library == OURS else _torch)(model, dtype)
        connection.send((parameters, disk, time.perf_counter() - started))
        while True:
            word = connection.recv()
            connection.send(one_round(engine, what, vocabulary) if word == "round" else _peak(library))
    except EOFError:
        return
    except Exception as error:
        connection.send(InputError(cause(error)))


def _ours(model: str, dtype: str | None) -> tuple[Engine, int, int, int]:
    loaded = load(model, dtype)
    decoder = loaded.decoder
    return Ours(decoder), parameter_count(decoder), weight_bytes(loaded.folder), decoder.embedding.shape[0]


def _torch(model: str, dtype: str | None) -> tuple[Engine, int, int, int]:
    import torch
    import transformers

    from convert import modeling_pruned, multimodal

    modeling_pruned.register()
    outline = describe(model)
    loader = getattr(transformers, multimodal.auto_class(outline.raw_config))
    loaded: Any = loader.from_pretrained(outline.folder, dtype=dtype or "auto").eval()
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary = loaded.config.get_text_config().vocab_size
    return Torch(loaded), loaded.num_parameters(), weight_bytes(outline.folder), vocabulary


def _peak(library: str) -> int:
    if library == OURS:
        return peak_bytes()
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_peak()


def weight_bytes(path: Path) -> int:
    """Bytes of the files of weights in a folder, or of one file."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    named = [file for file in files if file.suffix in WEIGHTS]
    return sum(file.stat().st_size for file in named or files)
