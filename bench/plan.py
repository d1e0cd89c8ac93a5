"""The memory that `minillm-jax plan` predicts beside the peak of the run, on a CPU.

    python bench/plan.py MODEL TEXT [--recipes ours wanda-sp mini-llm] [--ratio 0.2] [--name NAME]

Every run has a process of its own. Its peak is the resident memory of the whole process, libraries included, and so is
the prediction. The row of each recipe holds both, and the seconds of the run. The result is written to
bench/results/plan-NAME.json; NAME is the last part of MODEL by default.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import environment, peak_bytes

from convert.reader import describe_model
from minillm_jax import plan as plans
from minillm_jax.recipes import recipe as recipes
from minillm_jax.run import Job, run

RESULTS = Path(__file__).parent / "results"


def job_of(model: str, text: str, output: str, recipe: str, ratio: float) -> Job:
    """The job of one recipe."""
    given = {"ratio": ratio, "calibration": text}
    if recipe == "llm-pruner":
        given["layers"] = "all"  # its own range of layers asks for more than six layers
    chosen, flags = recipes.with_options(recipes.load(recipe), given)
    return Job(model, output, chosen, flags)


def measure(model: str, text: str, recipe: str, ratio: float) -> dict[str, Any]:
    """Prediction and peak of one recipe; the run is in a process of its own."""
    settings = job_of(model, text, "", recipe, ratio).check().recipe
    planned = plans.plan(describe_model(model), model, settings)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, model, text, "--ratio", str(ratio), "--child", recipe, f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    predicted = planned.device_bytes + planned.host_bytes
    return {
        "recipe": recipe,
        "parameters": planned.parameters_before,
        "tokens_per_channel": planned.tokens_per_channel,
        "predicted_bytes": predicted,
        "peak_bytes": measured["peak_bytes"],
        "predicted / peak": predicted / measured["peak_bytes"],
        "seconds": measured["seconds"],
    }


def child(model: str, text: str, recipe: str, ratio: float, output: str) -> None:
    """One run in this process; prints its peak and seconds as JSON."""
    result = run(job_of(model, text, output, recipe, ratio))
    print(json.dumps({"peak_bytes": peak_bytes(), "seconds": sum(result.seconds.values())}))


def main() -> None:
    """Measure every recipe, print the rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--recipes", nargs="+", default=["ours", "wanda-sp", "mini-llm"])
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--name")
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        child(chosen.model, chosen.text, chosen.child[0], chosen.ratio, chosen.child[1])
        return
    rows = []
    for recipe in chosen.recipes:
        rows.append(measure(chosen.model, chosen.text, recipe, chosen.ratio))
        print(json.dumps(rows[-1]))
    name = chosen.name or Path(chosen.model).name
    path = RESULTS / f"plan-{name}.json"
    path.write_text(json.dumps({"environment": environment(), "ratio": chosen.ratio, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
