"""The programs that test_recovery.py runs in processes of their own: recoveries on meshes, and in joined processes."""

import json
import sys
from typing import Any

import minillm_jax as mj
from minillm_jax import demo
from minillm_jax.devices import hosts, sharding
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.run_recovery import RecoveryJob, run

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


def recover_folder(root: str, method: str, output: str, mesh: str | None = None) -> None:
    """One whole recovery from folder to folder, with the unpruned model as teacher."""
    options = METHODS[method] | {"data": f"{root}/tokens.npy", "evaluate": f"{root}/tokens.npy", "window": 16}
    options |= {"seq_len": 16, "held_out": 4, "watch": f"{root}/tokens.npy"} | ({} if mesh is None else {"mesh": mesh})
    options |= {} if method in ("forward", "mezo") else {"teacher": f"{root}/model"}
    loaded = recipes.load_as(Recovery, options.pop("recipe", "distil"))
    recipe, given = recipes.with_options(loaded, options)
    run(RecoveryJob(f"{root}/pruned", output, recipe, given))


def joined(root: str, mesh: str, address: str) -> dict[str, Any]:
    """Recoveries by all methods in one of two processes."""
    hosts.initialise_hosts(hosts.parse_hosts(address))
    for method in METHODS:
        recover_folder(root, method, f"{root}/{mesh} {method}", mesh)
    return {"writer": hosts.is_writer()}


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.stdout.write(json.dumps({"losses": losses, "joined": joined}[name](*arguments)) + "\n")
