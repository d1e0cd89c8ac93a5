"""The study of recovery: perplexity of a model after pruning and after every way to recover it, on two texts.

    python bench/recover.py MODEL --train FILE --text NAME=FILE [--text NAME=FILE] [--ratios 0.2 0.5] [--seeds 2]
        [--methods ours:none ours:distil llm-pruner:peft] --output bench/results/recover-MODEL.json

A method is a recipe of `minillm-jax recipe list` for the pruning and a way to recover, joined by a colon:

    none       no recovery
    ce         low-rank adapters by the loss of the text
    distil     low-rank adapters by the recipe `distil`, with the dense model as teacher
    full       all weights by the recipe `distil`
    forward    low-rank adapters from forward passes alone, by the recipe `forward`
    peft       low-rank adapters by PEFT in PyTorch, with LLM-Pruner's rank, dropout and learning rate

All ways train on the same sequences in the same order, as many updates of as many sequences. A row is measured in a
process of its own and written at once; an interrupted study continues where it was. The evaluation windows are evenly
spaced over each text. The training text also calibrates.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import commit
from processes import FLAG, cost, end_with_parent, launch
from study import evaluation_windows, named_text, read, write

from minillm_jax import api
from minillm_jax.data.batches import Batches
from minillm_jax.data.examples import Examples
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import parameter_count
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovering import recover, texts_of
from minillm_jax.recovery.train import rows_of

WAYS = ("none", "ce", "distil", "full", "forward", "peft")
METHODS = (
    *(f"ours:{way}" for way in ("none", "ce", "distil", "full", "forward")),
    *(f"{recipe}:{way}" for recipe in ("llm-pruner", "wanda-sp", "flap") for way in ("none", "peft")),
)
# Options of each way beside those that all have; PEFT takes LLM-Pruner's.
OPTIONS: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce", "learning_rate": 1e-3},
    "distil": {"learning_rate": 1e-3},
    "full": {"method": "full", "learning_rate": 3e-4},
    "forward": {"learning_rate": 1e-3},
}
RANK, ALPHA, DROPOUT, RATE = 8, 16, 0.05, 1e-3

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row: a recipe and a way, joined by a colon; the ratio; the seed."""

    method: str
    ratio: float
    seed: int

    def made(self, row: Row) -> bool:
        """Whether a row is of this job."""
        return (row["method"], row["ratio"], row["seed"]) == (self.method, self.ratio, self.seed)


def measure(row: Row) -> Row:
    """The result of one row: load, prune, recover, evaluate. The process does nothing else."""
    recipe, way = row["method"].split(":")
    dense = api.load(row["model"])
    options: dict[str, Any] = {"layers": "all"} if recipe == "llm-pruner" else {}
    pruned = api.prune(dense, row["train"], row["ratio"], recipe, seed=row["seed"], **options)
    with np.load(row["windows"]) as texts:
        windows = {name: Batches(texts[name]) for name in texts.files}
    before = perplexities(pruned, windows)
    started = time.perf_counter()
    recovered, tokens = pruned, 0
    if way == "peft":
        recovered, tokens = by_peft(pruned, sequences(pruned, row), row)
    elif way != "none":
        recovered = ours(pruned, dense, way, row)
        assert recovered.record is not None, "a recovered model has a record"
        tokens = recovered.record["recovery"]["tokens"]
    return {
        "parameters": parameter_count(pruned.decoder),
        "perplexity_before": before,
        "perplexity": perplexities(recovered, windows),
        "dense": perplexities(dense, windows),
        "tokens": tokens,
        "recovery_seconds": round(time.perf_counter() - started, 1),
        **cost(),
    }


def perplexities(model: Model, windows: dict[str, Batches]) -> dict[str, float]:
    """The perplexity on each text."""
    return {name: api.evaluate(model, batches).perplexity for name, batches in windows.items()}


def shared_options(row: Row) -> dict[str, Any]:
    """The options of all ways: sequences, updates, seed."""
    shared = {key: row[key] for key in ("seq_len", "steps", "batch", "micro_batch", "seed")}
    return shared | {"held_out": 0, "validate_every": row["steps"], "warmup": row["steps"] // 10}


def settings_of(way: str, row: Row) -> Recovery:
    """The settings of a way of our own."""
    loaded = recipes.load_as(Recovery, "forward" if way == "forward" else "distil")
    return recipes.with_options(loaded, shared_options(row) | OPTIONS.get(way, {}))[0]


def ours(pruned: Model, dense: Model, way: str, row: Row) -> Model:
    """A model that this package has recovered."""
    teacher = None if way in ("ce", "forward") else dense
    return recover(pruned, row["train"], settings_of(way, row), teacher)


def sequences(pruned: Model, row: Row) -> Examples:
    """The sequences that all ways train on."""
    return texts_of(settings_of("ce", row), pruned, row["train"]).training


def by_peft(pruned: Model, examples: Examples, row: Row) -> tuple[Model, int]:
    """A model that PEFT has recovered in PyTorch, and the number of tokens that its loss counted."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from convert import modeling_pruned

    modeling_pruned.register()
    torch.manual_seed(row["seed"])
    with tempfile.TemporaryDirectory() as scratch:
        folder, merged = Path(scratch) / "pruned", Path(scratch) / "merged"
        api.save(pruned, folder)
        shape = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), shape).train()
        tokens = train_peft(model, examples, row)
        model.merge_and_unload().save_pretrained(merged)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (folder / name).exists():
                (merged / name).write_bytes((folder / name).read_bytes())
        return api.load(merged), tokens


def train_peft(model: Any, examples: Examples, row: Row) -> int:
    """Trains PEFT's model with AdamW, a linear schedule and clipping; the number of tokens that the loss counted."""
    import torch

    steps, batch, micro, total = row["steps"], row["batch"], row["micro_batch"], 0
    warmup = steps // 10
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: step / warmup if step < warmup else (steps - step) / (steps - warmup)
    )
    for update in range(steps):
        tokens, counted = examples.take(rows_of(update, examples.count, batch, row["seed"]))
        targets = int(counted.sum())
        total += targets
        for start in range(0, batch, micro):
            ids = torch.tensor(tokens[start : start + micro], dtype=torch.long)
            labels = torch.where(torch.tensor(counted[start : start + micro]), ids, -100)
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return total


def rows(arguments: argparse.Namespace, shared: Row, kept: list[Row]) -> Iterator[list[Row]]:
    """All rows after each new one; those of a job that fails are printed and left out."""
    for seed in range(arguments.seeds):
        for ratio in arguments.ratios:
            for method in arguments.methods:
                job = Job(method, ratio, seed)
                if any(job.made(row) for row in kept):
                    continue
                named = {"method": method, "ratio": ratio, "seed": seed}
                try:
                    measured = launch(Path(__file__), shared | named)
                except RuntimeError as error:
                    print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
                    continue
                kept = [*kept, named | measured | {"commit": commit()}]
                yield kept


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of Hugging Face")
    parser.add_argument("--train", type=Path, required=True, help="text to calibrate and to train on")
    parser.add_argument("--text", type=named_text, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="RECIPE:WAY")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=96, help="evaluation windows of each text")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    unknown = [one for one in arguments.methods if one.partition(":")[2] not in WAYS]
    if unknown:
        parser.error(f"method {unknown[0]!r} is not understood; expected RECIPE:WAY with a way of {', '.join(WAYS)}")
    return arguments


def main() -> None:
    """Measure one row for the flag `--row`, or all rows of a study."""
    if sys.argv[1:2] == [FLAG]:
        end_with_parent()
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    arguments = parse_arguments()
    try:
        outline = api.describe(arguments.model)
        texts = {
            name: evaluation_windows(path, outline.folder, arguments.windows, 128) for name, path in arguments.text
        }
        trained = {key: getattr(arguments, key) for key in ("steps", "batch", "micro_batch", "seq_len")}
        settings = {"model": Path(arguments.model).name, "train": arguments.train.name, **trained}
        settings["texts"] = {name: path.name for name, path in arguments.text}
        kept = read(arguments.output, settings)
    except InputError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        windows = Path(scratch) / "windows.npz"
        arrays: dict[str, Any] = {name: batches.windows for name, batches in texts.items()}
        np.savez(windows, **arrays)
        shared = {"model": arguments.model, "train": str(arguments.train), "windows": str(windows), **trained}
        for made in rows(arguments, shared, kept):
            write(arguments.output, settings, made)
            print(json.dumps(made[-1]), flush=True)


if __name__ == "__main__":
    main()
