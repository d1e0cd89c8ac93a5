"""A recovery on several devices has the losses of one device, and one in two processes the weights of one process.

`recovery_child` runs in processes of its own.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minillm_jax import demo
from tests.devices.processes import finish, start, two_hosts
from tests.devices.recovery_child import COMMANDS
from tests.helpers import hugging_face_folder


@cache
def losses(mesh: str) -> dict[str, Any]:
    """The losses of a recovery in a process with four virtual devices."""
    return finish([start(4, "recovery_child", "losses", mesh)])[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2", "data=4", "model=4", "fsdp=2,model=2"])
def test_a_mesh_gives_the_losses_of_one_device(mesh: str) -> None:
    one, many = losses("auto"), losses(mesh)
    for method, found in many.items():
        expected = np.asarray(one[method], dtype=float)
        # The refit multiplies the differences between float32 moments whose sums have another order, and MeZO those
        # between the losses at the ends of a short step.
        tolerance = {"refit": 1e-4, "mezo": 2e-5}.get(method, 3e-6)
        np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=tolerance, err_msg=method)
        assert expected[-1, 1] != expected[0, 1]


@pytest.mark.slow
def test_factors_of_experts_are_cut_as_the_experts_and_give_the_losses_of_one_device() -> None:
    one, many = (finish([start(4, "recovery_child", "experts", mesh)])[0] for mesh in ("auto", "data=2,model=2"))
    for method, found in many["points"].items():
        expected = np.asarray(one["points"][method], dtype=float)
        np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=1e-5, err_msg=method)
        assert expected[-1, 1] != expected[0, 1]
    # Of eight channels a device has four, in the last shards that the updates made.
    assert many["shards"] == {"gate": [[2, 6, 16, 8], [2, 6, 8, 4]], "down": [[2, 6, 4, 8], [2, 6, 8, 16]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `one` and `two`, written by the commands of `recovery_child` in one process and in two."""
    root, count = tmp_path_factory.mktemp("recovery"), json.loads((demo.FOLDER / "config.json").read_text())
    for seed, name in enumerate(("dense", "pruned")):
        hugging_face_folder(root / name, vocab_size=count["vocab_size"], seed=seed)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo.FOLDER / file, root / name)
    text = demo.training_text()
    (root / "text.txt").write_text(text[:3000])
    (root / "other.txt").write_text(text[-3000:])
    finished = finish([start(1, "recovery_child", "commands", root, root / "one")])
    finished += two_hosts(2, "recovery_child", "commands", root, root / "two")
    assert [process["statuses"] for process in finished] == [[0, 0]] * 3
    return root


def losses_of(folder: Path) -> np.ndarray:
    """Training, validation and watched losses of every point of a report."""
    points = json.loads((folder / "report.json").read_text())["points"]
    return np.asarray([[point[key] for key in ("loss", "validation", "watched")] for point in points], float)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recovery_in_two_processes_is_that_of_one(root: Path, name: str) -> None:
    """Although the second process would keep another state as the best.

    Sums over two devices have another order than on one. An update of AdamW divides a gradient by its size, so that
    the rounding of its smallest entries counts as much as that of its largest: 1e-5 is a thousandth of an update.
    """
    one, two = (root / which / name for which in ("one", "two"))
    for file in ("model.safetensors", *(["adapter/adapter_model.safetensors"] if name == "lora" else [])):
        left, right = (load_file(folder / file) for folder in (two, one))
        assert left.keys() == right.keys()
        for tensor, expected in right.items():
            np.testing.assert_allclose(left[tensor], expected, rtol=0, atol=1e-5, err_msg=tensor)
    found, expected = (losses_of(folder) for folder in (two, one))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1, 1] < expected[0, 1], "the best state is not the first one"
    assert sorted(path.name for path in (root / "two").iterdir()) == sorted(
        path.name for path in (root / "one").iterdir()
    )
