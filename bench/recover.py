"""The study of recovery: perplexity of a model after pruning and after every way to recover it, on several texts.

    python bench/recover.py MODEL --train FILE --text NAME=FILE [--text NAME=FILE] [--targets 0.2 0.5] [--seeds 2]
        [--methods ours:none ours:distil llm-pruner:peft] [--work DIR] --output bench/results/recover-MODEL.json

A method is a recipe of `minillm-jax recipe list` for the pruning (or `magnitude`: LLM-Pruner's with the magnitude of
the weights as criterion) and a way to recover, joined by a colon:

    none       no recovery
    refit      all matrices of the layers in closed form
    ce         low-rank adapters by the loss of the text
    distil     low-rank adapters by the recipe `distil`, with the dense model as teacher
    full       all weights by the recipe `distil`
    forward    low-rank adapters from forward passes alone, by the recipe `forward`
    mezo       all matrices from forward passes alone, by the recipe `mezo`
    peft       low-rank adapters by PEFT in PyTorch, with LLM-Pruner's dropout

A target is a share of the heads and channels of every layer, or a number of parameters. All ways train on the same
sequences in the same order, as many updates of as many sequences. A row is measured in a process of its own and written
at once; an interrupted study continues where it was. With `--work` the pruned models are pruned once for all ways, and
an interrupted row continues too. `--calibration` is the text of the pruning, the training text if it is not given.

A text is measured on evenly spaced windows of 128 tokens. One of rows with Alpaca's fields is measured on its responses
after Alpaca's prompt. `points` holds the loss on the second text and on held-out sequences against the tokens of the
training. bench/cut_text.py cuts texts into parts.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import commit
from processes import FLAG, cost, end_with_parent, launch
from study import evaluation_windows, named_text, read, write

from minillm_jax import api
from minillm_jax.data.examples import Examples, read_examples, whole_windows
from minillm_jax.data.text import tokenizer_of
from minillm_jax.devices.store import Store
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import parameter_count
from minillm_jax.options import COUNT
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovering import record_of, recover_model, texts_of
from minillm_jax.recovery import teacher as teachers
from minillm_jax.recovery.train import mean_loss, rows_of
from minillm_jax.recovery.trained import TrainedArrays

WAYS = ("none", "refit", "ce", "distil", "full", "forward", "mezo", "peft")
METHODS = (
    *(f"ours:{way}" for way in ("none", "refit", "ce", "distil", "full", "forward", "mezo")),
    *(f"{recipe}:{way}" for recipe in ("llm-pruner", "wanda-sp", "magnitude", "flap") for way in ("none", "peft")),
)
# Options of each way beside those that all have.
OPTIONS: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce"},
    "full": {"method": "full"},
    "refit": {"method": "refit"},
}
# Ways that train adapters, whose learning rate `--rate` sets. That of `full` is `--full-rate`, that of MeZO its own.
ADAPTERS = ("ce", "distil", "forward")
# Of PEFT's adapters, as in LLM-Pruner. All adapters have α = 2 · rank.
DROPOUT = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row: a recipe and a way, joined by a colon; the target; the seed."""

    method: str
    target: float
    seed: int

    def made(self, row: Row) -> bool:
        """Whether a row is of this job."""
        return (row["method"], row["target"], row["seed"]) == (self.method, self.target, self.seed)


def measure(row: Row) -> Row:
    """The result of one row: load, prune, recover, evaluate. The process does nothing else."""
    recipe, way = row["method"].split(":")
    dense = api.load(row["model"])
    pruned = pruned_model(dense, recipe, row)
    texts = {name: measured_text(Path(path), dense, row["windows"]) for name, path in row["texts"].items()}
    before = perplexities(pruned, texts)
    started = time.perf_counter()
    recovered, tokens, points = pruned, 0, []
    if way == "peft":
        recovered, tokens = by_peft(pruned, sequences(pruned, row), row)
    elif way != "none":
        recovered = ours(pruned, dense, way, row)
        assert recovered.record is not None, "a recovered model has a record"
        tokens, points = (recovered.record["recovery"][key] for key in ("tokens", "points"))
    return {
        "parameters": parameter_count(pruned.decoder),
        "perplexity_before": before,
        "perplexity": perplexities(recovered, texts),
        "dense": perplexities(dense, texts),
        "tokens": tokens,
        "points": points,
        "recovery_seconds": round(time.perf_counter() - started, 1),
        **cost(),
    }


def pruned_model(dense: Model, recipe: str, row: Row) -> Model:
    """The pruned model of a row, from the work folder if it is there."""
    folder = None if row["work"] is None else Path(row["work"]) / f"{recipe}-{row['target']:g}-{row['seed']}"
    if folder is not None and folder.exists():
        return api.load(folder)
    share = row["target"] < 1
    options: dict[str, Any] = {"ratio": row["target"]} if share else {"target_params": int(row["target"])}
    if recipe == "magnitude":  # nothing of it is random
        recipe, options["criterion"] = "llm-pruner", "magnitude"
    else:
        options["seed"] = row["seed"]
    if share and recipe == "llm-pruner":
        options["layers"] = "all"
    pruned = api.prune(dense, row["calibration"], recipe=recipe, **options)
    if folder is not None:
        api.save(pruned, folder)
    return pruned


def measured_text(path: Path, model: Model, windows: int) -> Examples:
    """The sequences that a text is measured on."""
    if path.suffix == ".jsonl":
        tokenizer, vocabulary = tokenizer_of(model.folder), model.decoder.embedding.shape[0]
        found = read_examples(str(path), tokenizer, vocabulary, 256, template="alpaca", loss_on="response")
        return found.split(found.count - windows, 0)[0] if found.count > windows else found
    return whole_windows(evaluation_windows(path, model.folder, windows, 128).windows, str(path))


def perplexities(model: Model, texts: dict[str, Examples]) -> dict[str, float]:
    """The perplexity on each text."""
    nothing = TrainedArrays("norms")
    return {name: math.exp(mean_loss(model.decoder, nothing, {}, found, 8)) for name, found in texts.items()}


def shared_options(row: Row) -> dict[str, Any]:
    """The options of all ways: sequences, updates, seed."""
    shared = {key: row[key] for key in ("seq_len", "steps", "batch", "micro_batch", "seed")}
    return shared | {"held_out": 16, "last": True, "validate_every": row["steps"] // 4, "warmup": row["steps"] // 10}


def settings_of(way: str, row: Row) -> Recovery:
    """The settings of a way of our own."""
    loaded = recipes.load_as(Recovery, way if way in ("forward", "mezo") else "distil")
    rates = {"full": row["full_rate"]} | dict.fromkeys(ADAPTERS, row["rate"])
    rate = {"learning_rate": rates[way]} if way in rates else {}
    shape = {"rank": row["rank"]} if way in ADAPTERS else {}
    return recipes.with_options(loaded, shared_options(row) | OPTIONS.get(way, {}) | rate | shape)[0]


def ours(pruned: Model, dense: Model, way: str, row: Row) -> Model:
    """A model that this package has recovered; an interrupted run in the work folder continues."""
    settings, teacher = settings_of(way, row), None if way in ("ce", "forward", "mezo") else dense
    texts = texts_of(settings, pruned, row["train"])
    watched = measured_text(Path(list(row["texts"].values())[-1]), dense, 32)
    texts = replace(texts, watched=watched)
    known = None if teacher is None else teachers.in_memory(teacher.decoder)
    if row["work"] is None:
        recovered = recover_model(pruned, texts, settings, known)
    else:
        keys = ("method", "target", "seed", "steps", "batch", "seq_len", "train", "rate", "full_rate", "rank")
        identity = {key: row[key] for key in keys}
        name = f"{row['method'].replace(':', '-')}-{row['target']:g}-{row['seed']}.state"
        with Store(Path(row["work"]) / name, identity, "a recovery", save_every=120) as store:
            recovered = recover_model(pruned, texts, settings, known, store)
    if recovered.outcome.stopped is not None:
        raise InputError(recovered.outcome.stopped)
    return replace(pruned, decoder=recovered.decoder, record=record_of(settings, pruned, recovered, texts))


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
        rank = {"r": row["rank"], "lora_alpha": 2 * row["rank"]}
        shape = peft.LoraConfig(**rank, lora_dropout=DROPOUT, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), shape).train()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
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
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], row["rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: step / warmup if step < warmup else (steps - step) / (steps - warmup)
    )
    for update in range(steps):
        tokens, counted = examples.take(rows_of(update, examples.count, batch, row["seed"]))
        targets = int(counted.sum())
        total += targets
        for start in range(0, batch, micro):
            ids = torch.tensor(tokens[start : start + micro], dtype=torch.long, device=model.device)
            labels = torch.where(torch.tensor(counted[start : start + micro], device=model.device), ids, -100)
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
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
        for target in arguments.targets:
            for method in arguments.methods:
                job = Job(method, target, seed)
                if any(job.made(row) for row in kept):
                    continue
                named = {"method": method, "target": target, "seed": seed}
                try:
                    measured = launch(Path(__file__), shared | named)
                except RuntimeError as error:
                    print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
                    continue
                kept = [*kept, named | measured | {"commit": commit()}]
                yield kept


def target_of(text: str) -> float:
    """A share, or a number of parameters."""
    return float(text) if text.startswith("0") else float(COUNT.read(text))


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of Hugging Face")
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--calibration", type=Path, help="text of the pruning; the training text if not given")
    parser.add_argument("--text", type=named_text, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="RECIPE:WAY")
    parser.add_argument("--targets", nargs="+", type=target_of, default=[0.2, 0.5], help="shares, or parameters: 110M")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of all adapters, PEFT's too")
    parser.add_argument("--rank", type=int, default=8, help="rank of all adapters, PEFT's too; 8 is LLM-Pruner's")
    parser.add_argument("--full-rate", type=float, default=3e-4, help="learning rate of all weights")
    parser.add_argument("--windows", type=int, default=96, help="sequences that each text is measured on")
    parser.add_argument("--work", type=Path, help="folder that keeps pruned models and unfinished rows")
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
    calibration = arguments.calibration or arguments.train
    numbers = {key: getattr(arguments, key) for key in ("steps", "batch", "micro_batch", "seq_len", "windows")}
    numbers |= {key: getattr(arguments, key) for key in ("rate", "full_rate", "rank")}
    names = {"model": Path(arguments.model).name, "train": arguments.train.name, "calibration": calibration.name}
    settings = names | numbers | {"texts": {name: path.name for name, path in arguments.text}}
    try:
        kept = read(arguments.output, settings)
    except InputError as error:
        sys.exit(f"error: {error}")
    paths = {"model": arguments.model, "train": str(arguments.train), "calibration": str(calibration)}
    shared = paths | numbers | {"texts": {name: str(path) for name, path in arguments.text}}
    shared["work"] = None if arguments.work is None else str(arguments.work)
    if arguments.work is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
    for made in rows(arguments, shared, kept):
        write(arguments.output, settings, made)
        print(json.dumps(made[-1]), flush=True)


if __name__ == "__main__":
    main()
