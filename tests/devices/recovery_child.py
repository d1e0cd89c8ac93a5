"""The programs that test_recovery.py runs in processes of their own: recoveries on meshes and in two processes.

`python -m tests.devices.recovery_child NAME ARGUMENTS...` calls the function of that name and prints its JSON result.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import minillm_jax as mj
from minillm_jax import cli, demo
from minillm_jax.data.examples import whole_windows
from minillm_jax.devices import sharding
from minillm_jax.model.config import LayerSizes, Routing, Sizes
from minillm_jax.recovery.recover import Texts, recover_decoder
from minillm_jax.recovery.settings import ForwardOnly, Sections, Training
from tests.helpers import random_tokens, small_decoder

OPTIONS = {"seq_len": 32, "steps": 3, "batch": 8, "micro_batch": 4, "validate_every": 1, "learning_rate": 1e-3}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", **OPTIONS},
    "full": {"method": "full", **OPTIONS},
    "forward": {"method": "forward", **OPTIONS},
    "mezo": {"recipe": "mezo", "method": "forward", **OPTIONS},
    "refit": {"method": "refit", "seq_len": 32, "steps": 8, "refit_alpha": 1.0},
}

# Commands whose processes are joined; the teacher's tokens come from memory and from a folder that they write.
COMMANDS = {
    "lora": ["--loss", "both"],
    "full": ["--method", "full", "--teacher-logits", "teacher"],
}
COMMON = ["--seq-len", "16", "--steps", "3", "--batch", "4", "--micro-batch", "2", "--validate-every", "1"]
COMMON += ["--learning-rate", "1e-2", "--held-out", "4", "--watch-windows", "4", "--quiet"]


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


def of_experts(mesh: str) -> dict[str, Any]:
    """Training and validation losses of a mixture of experts, by each method; and the shards of factors of experts."""
    jax.config.update("jax_disable_most_optimizations", True)
    sizes = Sizes(V=61, D=16, H=4, layers=(LayerSizes(N=4, K=4, F=0, X=6, W=8),) * 2)
    single = small_decoder(sizes=sizes, family="mixtral", routing=Routing(2))
    decoder = sharding.shard(single, sharding.make_mesh(sharding.parse_mesh(mesh)))
    texts = Texts(*(whole_windows(random_tokens(61, count, 12, seed=count), "random") for count in (16, 4)))
    training = Training(steps=3, batch=8, micro_batch=4, validate_every=1, warmup=0, learning_rate=1e-2, last=True)
    made = {
        "lora": Sections(training),
        "forward": Sections(replace(training, method="forward")),
        "mezo": Sections(replace(training, method="forward", learning_rate=1e-3), forward=ForwardOnly("matrices", 2)),
    }
    found = {name: recover_decoder(decoder, texts, sections) for name, sections in made.items()}
    adapter = found["lora"].adapter
    assert adapter is not None
    points = {name: [[point.loss, point.validation] for point in one.outcome.points] for name, one in found.items()}
    shards = {
        name: [list(factor.addressable_shards[0].data.shape) for factor in adapter[0][f"experts.{name}"]]
        for name in ("gate", "down")
    }
    return {"points": points, "shards": shards}


def commands(folder: str, out: str, *joined: str) -> dict[str, Any]:
    """The command recover on a text and two models of a folder, in one process or in one of two joined ones.

    The second process reads all validation losses with the wrong sign: by them it would keep the worst state.

    Args:
      folder: with the models `pruned` and `dense` and the texts `text.txt` and `other.txt`.
      out: folder of the outputs.
      *joined: the address of the job; nothing for one process.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    if joined and joined[0].endswith(",1"):
        total = np.sum
        patch = pytest.MonkeyPatch()
        patch.setattr(np, "sum", lambda a, *rest, **more: (-1 if is_losses(a) else 1) * total(a, *rest, **more))
    data = ["--data", f"{folder}/text.txt", "--watch", f"{folder}/other.txt", "--evaluate", f"{folder}/other.txt"]
    statuses = []
    for name, options in COMMANDS.items():
        given = [f"{out}/{option}" if option == "teacher" else option for option in options]
        where = ["--mesh", "data=1,model=4"] if joined else []
        where += ["--hosts", joined[0]] if joined and not statuses else []  # processes join once
        sys.argv = ["minillm-jax", "recover", f"{folder}/pruned", "--teacher", f"{folder}/dense", *data]
        sys.argv += [*COMMON, *given, *where, "--output", f"{out}/{name}"]
        try:
            cli.main()
        except SystemExit as ended:
            statuses.append(ended.code or 0)
    return {"statuses": statuses}


def is_losses(array: Any) -> bool:
    """Whether these are the losses of the batches of a validation, which the mean takes as numbers of NumPy."""
    return isinstance(array, list) and all(isinstance(value, np.float64) for value in array)


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.stdout.write(
        "\n" + json.dumps({"losses": losses, "experts": of_experts, "commands": commands}[name](*arguments)) + "\n"
    )
