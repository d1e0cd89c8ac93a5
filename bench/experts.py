"""The study of expert pruning: perplexity after experts are removed by each criterion, with and without refit.

The rows `expert-channels` remove the same share of the channels inside all experts instead.

    python bench/experts.py MODEL --calibration FILE --text NAME=FILE [--text NAME=FILE] [--ratios 0.25 0.5] [--seeds 3]
        [--recover 60] --output bench/results/experts-MODEL.json

MODEL is a mixture of experts, that of bench/train_moe.py for example. A seed draws the calibration windows and the
scores of the control `random`. With `--recover N`, the rows of seed 0 are recovered too: N updates of all weights by
the recipe `distil`, with the dense model as teacher, on the calibration text. The row `adapters` of every ratio is that
of `reap` with the refit, recovered by low-rank adapters on all matrices, of the same recipe, in the place of all
weights. Every row is measured in a process of its own and written at once; an interrupted study continues where it was.
`perplexity` is that of the pruned model and `recovered` that of the recovered one, for each text; `trained` counts the
parameters of the adapters.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from environment import commit
from processes import FLAG, cost, end_with_parent, launch
from recover import measured_text, ours, perplexities, settings_of
from study import named_text, read, write

from minillm_jax import api
from minillm_jax.model.tree import parameter_count
from minillm_jax.recovery import adapter as adapters
from minillm_jax.settings import EXPERT_CRITERIA

REFITS = ("none", "least-squares")
# In the place of a criterion of whole experts: the share of the channels of every expert is removed instead.
CHANNELS = "expert-channels"
# What a recovery trains -> its way in bench/recover.py.
WAYS = {"weights": "full", "adapters": "distil"}
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
    seconds, recovered, trained = round(time.perf_counter() - started, 1), None, {}
    if row["recover"] and row["seed"] == 0:
        settings = {"steps": row["recover"], "batch": 16, "micro_batch": 16, "seq_len": 128, "work": None}
        model = ours(pruned, dense, WAYS[row["recovery"]], row | settings | {"train": row["calibration"]})
        recovered = perplexities(model, texts)
        if row["recovery"] == "adapters":
            lora = settings_of(WAYS["adapters"], row | settings).computed.lora()
            trained = {"trained": adapters.size(adapters.initial(pruned.decoder, lora, row["seed"]))}
    return {
        "parameters": parameter_count(pruned.decoder),
        "perplexity": perplexities(pruned, texts),
        "recovered": recovered,
        **trained,
        "pruning_seconds": seconds,
        **cost(),
    }


def jobs(ratios: list[float], seeds: int, recover: bool) -> list[Row]:
    """All rows: the dense model, then every ratio, criterion and refit, with each seed, then those of adapters."""
    named = [
        {"criterion": criterion, "refit": refit, "ratio": ratio, "seed": seed}
        for seed in range(seeds)
        for ratio in ratios
        for criterion in (*EXPERT_CRITERIA, CHANNELS)
        for refit in REFITS
    ]
    best = [{"criterion": "reap", "refit": "least-squares", "ratio": ratio, "seed": 0} for ratio in ratios]
    adapters = [row | {"recovery": "adapters"} for row in best] if recover else []
    return [{"criterion": "dense", "refit": "none", "ratio": 0.0, "seed": 0}, *named, *adapters]


def made(row: Row, named: Row) -> bool:
    """Whether a row is that of a job. Rows without a word about the recovery train all weights."""
    measured, asked = ({"recovery": "weights"} | one for one in (row, named))
    return all(measured[key] == value for key, value in asked.items())


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
    for named in jobs(arguments.ratios, arguments.seeds, arguments.recover > 0):
        if any(made(row, named) for row in rows):
            continue
        asked = {"recovery": "weights"} | shared | named
        rows = [*rows, named | launch(Path(__file__), asked) | {"commit": commit()}]
        write(arguments.output, settings, rows)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
