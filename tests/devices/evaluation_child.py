"""The programs that test_evaluation.py runs in processes of their own: evaluations on meshes and in two processes.

`python -m tests.devices.evaluation_child NAME ARGUMENTS...` calls the function of that name and prints its JSON result.
"""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import jax
import pytest
from lm_eval.api.instance import Instance

import minillm_jax as mj
from minillm_jax import cli
from minillm_jax.devices import sharding
from minillm_jax.evaluation.harness import Harness
from minillm_jax.evaluation.tasks import TaskSettings, questions_of

MESHES = ("data=8", "model=8", "data=2,model=4")
JOINED = "data=2,model=2"
TASKS = "tiny_choices,tiny_contexts"


def command(*arguments: str) -> Any:
    """The JSON object that a command prints; None from a process that does not print."""
    sys.argv, shown = ["minillm-jax", *arguments], StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, ended.value.code
    return json.loads(shown.getvalue()) if shown.getvalue() else None


def commands(folder: str, *where: str) -> dict[str, Any]:
    """A comparison and tasks of the models `dense` and `pruned` of a folder, by the command line.

    Args:
      folder: also holds `text.txt` and the tasks in `yaml`.
      *where: options of the devices.
    """
    models, text = [f"{folder}/dense", f"{folder}/pruned"], ["--text", f"{folder}/text.txt", "--window", "16"]
    drafting = ["--windows", "8", "--draft", "2", "--prompts", "2", "--new-tokens", "6"]
    mesh = [option for option in where if not option.startswith(("--hosts", "127."))]  # processes join once
    return {
        "compare": command("compare", *models, *text, *drafting, "--json", *where),
        "eval": command(
            "eval", models[1], "--tasks", TASKS, "--include-path", f"{folder}/yaml", *text, "--json", *mesh
        ),
    }


def requests(folder: str) -> list[Instance]:
    """The log-likelihood requests of all tasks of a folder."""
    found = []
    for task in questions_of(TaskSettings(tuple(TASKS.split(",")), include_path=f"{folder}/yaml")):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(rank=0, world_size=1)
        found += [request for request in task.instances if request.request_type == "loglikelihood"]
    return found


def on_meshes(folder: str) -> dict[str, Any]:
    """The commands, and the log-likelihood of every request, on one device and on meshes of eight."""
    jax.config.update("jax_disable_most_optimizations", True)
    asked, result = requests(folder), {}
    for mesh in ("one", *MESHES):
        where = [] if mesh == "one" else ["--mesh", mesh]
        devices = None if mesh == "one" else sharding.make_mesh(sharding.parse_mesh(mesh))
        harness = Harness(mj.load(f"{folder}/pruned", None, devices), tokens_per_batch=64)
        result[mesh] = {"logs": [log for log, _ in harness.loglikelihood(asked)]} | commands(folder, *where)
    return result


def joined(folder: str, address: str) -> dict[str, Any]:
    """The commands in one of two joined processes."""
    jax.config.update("jax_disable_most_optimizations", True)
    return commands(folder, "--mesh", JOINED, "--hosts", address)


if __name__ == "__main__":
    _, name, *arguments = sys.argv
    sys.stdout.write("\n" + json.dumps({"on_meshes": on_meshes, "joined": joined}[name](*arguments)) + "\n")
