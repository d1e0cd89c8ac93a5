"""The study of expert pruning: perplexity after experts are removed by each criterion, with and without refit.

The rows `expert-channels` remove the same share of the channels inside all experts instead.

    python bench/experts.py MODEL --calibration FILE --text NAME=FILE [--text NAME=FILE] [--ratios 0.25 0.5] [--seeds 3]
        [--recover 60] --output bench/results/experts-MODEL.json

MODEL is a mixture of experts, that of bench/train_moe.py for example. A seed draws the calibration windows and the
scores of the control `random`. With `--recover N`, the rows of seed 0 are recovered too: N updates of all weights by
the recipe `distil`, with the dense model as teacher, on the calibration text. Every row is measured in a process of its
own and written at once; an interrupted study continues where it was. `perplexity` is that of the pruned model and
`recovered` that of the recovered one, for each text.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from environment import commit
from processes import FLAG, cost, end_with_parent, launch
from recover import measured_text, ours, perplexities
from study import named_text, read, write

from minillm_jax import api
from minillm_jax.model.tree import parameter_count
from minillm_jax.settings import EXPERT_CRITERIA

REFITS = ("none", "least-squares")
# In the place of a criterion of whole experts: the share of the channels of every expert is removed instead.
CHANNELS = "expert-channels"
WINDOWS = 64

Row = dict[str, Any]


def measure(row: Row) -> Row:
    """The result of one row: load, prune, evaluate, recover. The process does nothing else."""
    dense = api.load(row["model"])
    texts = {name: measured_text(Path(path), dense, WINDOWS) for name, path in row["texts"].items()}
    if row["criterion"] == "dense":
        return {"parameters": parameter_count(dense.decoder), "perplexity": perplexities(dense, texts), **cost()}
    started = time.perf_counter()
    options: dict[str, Any] = {"ratio": row["ratio"], "seed": row["seed"], "refit": row["refit"]}
    if row["criterion"] == CHANNELS:
        options["structures"] = (CHANNELS,)
    else:
        options |= {"structures": ("experts",), "expert_criterion": row["criterion"]}
    pruned = api.prune(dense, row["calibration"], **options)
    seconds, recovered = round(time.perf_counter() - started, 1), None
    if row["recover"] and row["seed"] == 0:
        settings = {"steps": row["recover"], "batch": 16, "micro_batch": 16, "seq_len": 128, "work": None}
        model = ours(pruned, dense, "full", row | settings | {"train": row["calibration"]})
        recovered = perplexities(model, texts)
    return {
        "parameters": parameter_count(pruned.decoder),
        "perplexity": perplexities(pruned, texts),
        "recovered": recovered,
        "pruning_seconds": seconds,
        **cost(),
    }


def jobs(ratios: list[float], seeds: int) -> list[Row]:
    """All rows: the dense model, then every ratio, criterion and refit, with each seed."""
    named = [
        {"criterion": criterion, "refit": refit, "ratio": ratio, "seed": seed}
        for seed in range(seeds)
        for ratio in ratios
        for criterion in (*EXPERT_CRITERIA, CHANNELS)
        for refit in REFITS
    ]
    return [{"criterion": "dense", "refit": "none", "ratio": 0.0, "seed": 0}, *named]


def main() -> None:
    """Measure one row for the flag `--row`, or all rows of the study."""
    if sys.argv[1:2] == [FLAG]:
        end_with_parent()
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of Hugging Face")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=named_text, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recover", type=int, default=0, help="updates of the recovery of the rows of seed 0")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts = {name: path.name for name, path in arguments.text}
    settings = {"model": Path(arguments.model).name, "calibration": arguments.calibration.name, "texts": texts}
    settings |= {"recover": arguments.recover, "windows": WINDOWS}
    shared = {"model": arguments.model, "calibration": str(arguments.calibration), "recover": arguments.recover}
    shared["texts"] = {name: str(path) for name, path in arguments.text}
    rows = read(arguments.output, settings)
    for named in jobs(arguments.ratios, arguments.seeds):
        if any(all(row[key] == value for key, value in named.items()) for row in rows):
            continue
        rows = [*rows, named | launch(Path(__file__), shared | named) | {"commit": commit()}]
        write(arguments.output, settings, rows)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
