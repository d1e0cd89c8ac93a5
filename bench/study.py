"""The study of one model: perplexity of recipes, controls and peers with equally many parameters, on several texts.

    python bench/study.py MODEL --calibration FILE --text NAME=FILE [--text NAME=FILE] --params 110M 80M
        [--recipes ours ours+allocation=equal torch-pruning] [--seeds 3] --output bench/results/study-MODEL.json

A recipe is a name of `minillm-jax recipe list`, with options of `minillm-jax prune` behind it: `ours+criterion=noise`,
`wanda-sp+samples=256`. `torch-pruning` is a peer (bench/peers.py). A recipe keeps its own number of calibration windows
and its own layers. A peer without random numbers has one row whatever the number of seeds.

Each row is measured in a process of its own and written at once. A study that was interrupted continues where it was:
rows of the same recipe, target, seed and commit are kept; with `--keep` those of any commit. A row holds

    perplexity          of the pruned model, for each text; the row `dense` holds those of the dense model
    parameters, counts  of the pruned model; the heads and channels of every layer
    seconds, cpu_seconds, peak_bytes    of the whole process, from the start of Python to the last perplexity, with
                        compilation; the seconds of the processor are those of all threads
    load                of the machine before the process began, as the number of processes that ran or waited
    pruning_seconds     from the calibration text to the pruned model
    calibration_tokens, tokens_per_channel    of the calibration windows, for each channel of the widest MLP

The evaluation windows are evenly spaced over each text and the same for all rows. The seed draws the calibration
windows, directions, noise and random scores.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from environment import commit, environment
from processes import FLAG, cost, end_with_parent, launch
from texts import documents

from minillm_jax import api
from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.data.windows import cut
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, parameter_count
from minillm_jax.options import COUNT
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe

DENSE = "dense"
# Recipe -> the script that measures its rows. They have no random numbers.
PEERS = {"torch-pruning": Path(__file__).with_name("peers.py")}

RECIPES = (
    "ours",
    "ours+allocation=equal",
    "ours+allocation=uniform",
    "flap",
    "wanda-sp",
    "llm-pruner",
    "mini-llm",
    "torch-pruning",
    "ours+criterion=noise",
    "ours+criterion=random",
    "ours+criterion=noise+refit=none",
    "ours+criterion=random+refit=none",
    "ours+criterion=magnitude+refit=none",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row of the study: a recipe, the most parameters that are left, and a seed."""

    recipe: str
    target: int | None = None
    seed: int = 0

    def made(self, row: Row) -> bool:
        """Whether a row is of this job."""
        return (row["recipe"], row["target"], row["seed"]) == (self.recipe, self.target, self.seed)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a recipe that is written as `name+key=value+key=value`.

    Raises:
      InputError: a part has no key or no value, or a key comes twice.
    """
    name, *parts = text.split("+")
    options: dict[str, Any] = {}
    for part in parts:
        key, _, value = part.partition("=")
        if not key or not value or key in options:
            raise InputError(f"recipe {text!r} is not understood at {part!r}; expected NAME+KEY=VALUE, each key once")
        options[key] = {"true": True, "false": False}.get(value, value)
    return name, options


def settings_of(job: Job) -> Recipe:
    """The settings of a job of our own.

    Raises:
      InputError: there is no such recipe or option, or an option would do nothing.
    """
    name, options = parse(job.recipe)
    loaded = recipes.load(name)
    seeded = replace(loaded, data=replace(loaded.data, seed=job.seed))
    return api.settings_of(seeded, options | {"target_params": job.target})


def jobs_of(names: Iterable[str], targets: Iterable[int], seeds: int) -> list[Job]:
    """The dense model, then all recipes and targets of the first seed, of the second, and so on; each job once."""
    targets = list(targets)
    jobs = [
        Job(name, target, seed)
        for seed in range(seeds)
        for target in targets
        for name in names
        if seed == 0 or name not in PEERS
    ]
    return list(dict.fromkeys([Job(DENSE), *jobs]))


# ------------------------------------------------------------------------------------------------------- one row


def measure(row: Row) -> Row:
    """The result of one row: load, prune, evaluate. The process does nothing else."""
    job = Job(row["recipe"], row["target"], row["seed"])
    model = api.load(row["model"], row["dtype"])
    widest = max(group_counts(model.decoder, "channel"))
    tokens, start = 0, time.perf_counter()
    if job.recipe != DENSE:
        settings = settings_of(job)
        model = api.prune(model, row["calibration"], recipe=settings)
        assert model.record is not None, "a pruned model has a record"
        drawn = model.record["calibration"]
        tokens = drawn["samples"] * drawn["length"] if drawn["samples"] > 1 else 0  # one where the run reads no text
    seconds = time.perf_counter() - start
    with np.load(row["windows"]) as texts:
        measured = {name: api.evaluate(model, Batches(texts[name])).perplexity for name in texts.files}
    return {
        "parameters": parameter_count(model.decoder),
        "perplexity": measured,
        "pruning_seconds": round(seconds, 1),
        "counts": {kind: group_counts(model.decoder, kind) for kind in ("head", "channel")},
        "calibration_tokens": tokens,
        "tokens_per_channel": round(tokens / widest, 2),
        **cost(),
    }


def measured_by(shared: Row) -> Callable[[Job], Row]:
    """A function that measures a job in a process of its own; `shared` is what the rows of a study have in common."""

    def result(job: Job) -> Row:
        script = PEERS.get(job.recipe, Path(__file__))
        return launch(script, shared | {"recipe": job.recipe, "target": job.target, "seed": job.seed})

    return result


# ------------------------------------------------------------------------------------------------------ all rows


def read(output: Path, settings: Row) -> list[Row]:
    """The rows of an earlier run with the same settings; none where the file does not exist.

    Raises:
      InputError: the file holds the rows of another study.
    """
    if not output.exists():
        return []
    study = json.loads(output.read_text())
    for key, value in settings.items():
        if study["settings"][key] != value:
            raise InputError(
                f"{output} was measured with {key} {study['settings'][key]}, and this study has {value}; give another "
                "--output"
            )
    return study["rows"]


def write(output: Path, settings: Row, rows: list[Row]) -> None:
    """Write the study whole or not at all, a line for each row."""
    head = json.dumps({"environment": environment(), "settings": settings}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    part = output.with_name(output.name + ".part")
    part.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n')
    part.replace(output)


def complete(
    jobs: Iterable[Job], rows: list[Row], made_at: str, keep: bool, result: Callable[[Job], Row]
) -> Iterator[tuple[Job, list[Row] | RuntimeError]]:
    """Measure the jobs that have no row yet; gives all rows after each job, or the error of a job that failed.

    Args:
      jobs: all jobs of the study.
      rows: the rows of an earlier run.
      made_at: the commit of this run. Rows of other commits are measured again, unless `keep`.
      keep: whether rows of any commit are kept.
      result: measures a job.
    """
    for job in jobs:
        if any(job.made(row) and (keep or row["commit"] == made_at) for row in rows):
            continue
        try:
            measured = result(job)
        except RuntimeError as error:
            yield job, error
            continue
        row = {"recipe": job.recipe, "target": job.target, "seed": job.seed, **measured, "commit": made_at}
        rows = [*(one for one in rows if not job.made(one)), row]
        yield job, rows


# --------------------------------------------------------------------------------------------------- command line


def evaluation_windows(path: Path, folder: Path, count: int, length: int) -> Batches:
    """Windows of a text, evenly spaced.

    Raises:
      InputError: the text is too short.
    """
    windows = cut(Tokens(tokenise(documents(path), folder), str(path), 1), length)
    if len(windows) < count:
        raise InputError(f"{path}: the text has {len(windows)} windows of {length} tokens, and {count} are asked for")
    return Batches(windows[np.arange(count) * len(windows) // count])


def named_text(text: str) -> tuple[str, Path]:
    """Name and path of a text that is written as NAME=FILE."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected NAME=FILE")
    return name, Path(path)


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or Hub id; peers take a folder of Hugging Face")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=named_text, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--params", type=COUNT.read, nargs="+", required=True, help="parameters left: 109.75M")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME+KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, default=128, help="evaluation windows of each text")
    parser.add_argument("--length", type=int, default=128, help="tokens of an evaluation window")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", action="store_true", help="keep rows of other commits")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def check(jobs: Iterable[Job], outline: Model, calibration: Path) -> None:
    """Check the recipes of our own, and that the calibration text has enough windows for each.

    Raises:
      InputError: see `settings_of` and `api.calibrate`.
    """
    needed = {}
    for job in jobs:
        if job.recipe not in (DENSE, *PEERS):
            data = settings_of(job).data
            needed[data.samples, data.seq_len] = job
    for (samples, length), job in needed.items():
        try:
            api.calibrate(outline, calibration, samples, length)
        except InputError as error:
            raise InputError(f"recipe {job.recipe}: {error}") from None


def study(arguments: argparse.Namespace) -> int:
    """Measure all rows, print and write each at once; the number of jobs that failed.

    Raises:
      InputError: a recipe, an option or a text cannot be used; before the first row.
    """
    jobs = jobs_of(arguments.recipes, map(int, arguments.params), arguments.seeds)
    outline = api.describe(arguments.model)
    check(jobs, outline, arguments.calibration)
    texts = {
        name: evaluation_windows(path, outline.folder, arguments.windows, arguments.length)
        for name, path in arguments.text
    }
    settings = {
        "model": Path(arguments.model).name,
        "calibration": arguments.calibration.name,
        "texts": {name: path.name for name, path in arguments.text},
        "tokens_sha256": {name: batches.fingerprint() for name, batches in texts.items()},
        "windows": arguments.windows,
        "length": arguments.length,
        "dtype": arguments.dtype,
    }
    failed, rows = 0, read(arguments.output, settings)
    with tempfile.TemporaryDirectory() as scratch:
        windows = Path(scratch) / "windows.npz"
        arrays: dict[str, Any] = {name: batches.windows for name, batches in texts.items()}
        np.savez(windows, **arrays)
        shared = {key: str(getattr(arguments, key)) for key in ("model", "calibration", "dtype")}
        result = measured_by(shared | {"windows": str(windows)})
        for job, done in complete(jobs, rows, commit(), arguments.keep, result):
            if isinstance(done, RuntimeError):
                failed += 1
                print(f"failed: {job}: {done}", file=sys.stderr, flush=True)
                continue
            write(arguments.output, settings, done)
            print(json.dumps(done[-1]), flush=True)
    return failed


def main() -> None:
    """Measure one row for the flag `--row`, or all rows of a study."""
    if sys.argv[1:2] == [FLAG]:
        end_with_parent()
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    try:
        failed = study(parse_arguments())
    except InputError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"{failed} rows failed; run the same command again to try them again")


if __name__ == "__main__":
    main()
