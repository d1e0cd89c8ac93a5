"""The program that test_recovery.py runs in processes of their own: the losses of a recovery on a mesh, as JSON."""

import json
import sys
from typing import Any

import minillm_jax as mj
from minillm_jax import demo
from minillm_jax.devices import sharding

OPTIONS = {"seq_len": 32, "steps": 3, "batch": 8, "micro_batch": 4, "validate_every": 1, "learning_rate": 1e-3}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", **OPTIONS},
    "full": {"method": "full", **OPTIONS},
    "forward": {"method": "forward", **OPTIONS},
    "mezo": {"recipe": "mezo", "method": "forward", **OPTIONS},
    "refit": {"method": "refit", "seq_len": 32, "steps": 8, "refit_alpha": 1.0},
}


def losses(mesh: str) -> dict[str, Any]:
    """Training and validation losses of the pruned demo model, by each method."""
    model = mj.load(demo.FOLDER, None, sharding.make_mesh(sharding.parse_mesh(mesh)))
    text = [demo.training_text()[:30_000]]
    pruned = mj.prune(model, text, 0.4, "wanda-sp", samples=4, seq_len=32)
    points = {}
    for method, options in METHODS.items():
        teacher = model if options["method"] in ("lora", "full", "refit") else None
        record = mj.recover(pruned, text, teacher=teacher, **options).record or {}
        points[method] = [[point["loss"], point["validation"]] for point in record["recovery"]["points"]]
    return points


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.stdout.write(json.dumps({"losses": losses}[name](*arguments)) + "\n")
