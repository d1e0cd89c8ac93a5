"""Speed of models beside each other: prompts, further tokens, memory, in this package and in transformers.

    python bench/speed.py NAME=FOLDER [NAME=FOLDER ...] [--rounded NAME=COUNT ...] [--target-params 110M]
        [--no-torch] [--prompt 128] [--tokens 32] [--batch-sizes 1,8] [--rounds 3] [--dtype float32]
        --output bench/results/speed-NAME.json

The first model is the dense one; all take turns, as in `minillm-jax bench`, which measures them. `--rounded 64=64`
prunes the dense model to `--target-params` by the magnitude of its weights over all layers together, with widths that
are multiples of 64, and times the result under the name 64: speed does not depend on which channels are removed.
"""

import argparse
import json
import tempfile
from pathlib import Path

from environment import environment

from minillm_jax import api, timing
from minillm_jax.evaluation.speed import Load
from minillm_jax.options import COUNT
from minillm_jax.report.speed import result_json


def rounded(dense: str, multiple: int, parameters: int, folder: Path) -> str:
    """A folder with the dense model pruned by magnitude, its widths multiples of a number."""
    model = api.load(dense)
    options = {"criterion": "magnitude", "refit": "none", "allocation": "global", "round_width_to": multiple}
    text = ["No weight depends on this text. " * 1000]
    pruned = api.prune(model, text, target_params=parameters, **options)
    api.save(pruned, folder)
    return str(folder)


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE as a pair."""
    name, _, value = text.partition("=")
    return name, value


def main() -> None:
    """Time all models and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=named, metavar="NAME=FOLDER")
    parser.add_argument("--rounded", nargs="*", type=named, default=[], metavar="NAME=COUNT")
    parser.add_argument("--target-params", type=COUNT.read)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", help="type of the weights; the stored one if not given")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    load = Load(arguments.prompt, arguments.tokens, tuple(int(size) for size in arguments.batch_sizes.split(",")))
    libraries = (timing.OURS, timing.TORCH) if arguments.torch else (timing.OURS,)
    models = dict(arguments.models)
    dense = next(iter(models.values()))
    with tempfile.TemporaryDirectory() as scratch:
        for name, multiple in arguments.rounded:
            models[name] = rounded(dense, int(multiple), int(arguments.target_params), Path(scratch) / name)
        timing.check(list(models.values()), load, arguments.rounds, libraries)
        found = timing.time_models(list(models.values()), load, arguments.rounds, libraries, arguments.dtype)
    result = result_json(found, load, arguments.rounds)
    for name, row in zip([name for name in models for _ in libraries], result["models"], strict=True):
        row["model"] = name
        print(json.dumps(row), flush=True)
    written = {"environment": environment(), **result, "dtype": arguments.dtype or "stored"}
    arguments.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
