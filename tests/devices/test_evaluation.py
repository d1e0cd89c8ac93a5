"""Tasks and comparisons on several devices and in two processes give the figures of one device.

`evaluation_child` runs in processes of its own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.local_tasks import write
from minillm_jax import demo
from tests.devices.evaluation_child import MESHES
from tests.devices.processes import finish, start, two_hosts
from tests.evaluation.test_tasks import CONTEXTS, QUESTIONS
from tests.helpers import hugging_face_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, a text and two tasks. Heads, channels and vocabulary divide by eight, or not."""
    root, config = tmp_path_factory.mktemp("evaluation"), json.loads((demo.FOLDER / "config.json").read_text())
    for name, width in (("dense", 64), ("pruned", 40)):
        hugging_face_folder(root / name, vocab_size=config["vocab_size"], intermediate_size=width)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo.FOLDER / file, root / name)
    (root / "text.txt").write_text(demo.held_out_text()[:2000])
    for name, rows in {"tiny_choices": QUESTIONS, "tiny_contexts": CONTEXTS}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(root / "yaml", {name: root / f"{name}.jsonl" for name in ("tiny_choices", "tiny_contexts")})
    return root


@pytest.fixture(scope="module")
def meshes(root: Path) -> dict[str, Any]:
    """One process with eight devices: the results on one of them, and on every mesh."""
    return finish([start(8, "evaluation_child", "on_meshes", root)])[0]


def assert_same_figures(found: Any, expected: Any, place: str = "") -> None:
    """Numbers equal to 1e-5 and everything else equal; seconds, and what follows from them, may differ."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            if not key.startswith(("ms_", "seconds", "speedup")):
                assert_same_figures(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same_figures(one, other, f"{place}/{number}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), place
    else:
        assert found == expected, place


@pytest.mark.parametrize("mesh", MESHES)
def test_log_likelihoods_on_a_mesh_are_those_of_one_device(meshes: dict[str, Any], mesh: str) -> None:
    logs = np.asarray(meshes["one"]["logs"])
    assert len(logs) >= 8
    assert len(np.unique(logs)) > 4
    np.testing.assert_allclose(meshes[mesh]["logs"], logs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("command", ["compare", "eval"])
@pytest.mark.parametrize("mesh", MESHES)
def test_commands_on_a_mesh_print_the_figures_of_one_device(meshes: dict[str, Any], mesh: str, command: str) -> None:
    assert_same_figures(meshes[mesh][command], meshes["one"][command])


@pytest.fixture(scope="module")
def processes(root: Path) -> list[dict[str, Any]]:
    """Two joined processes with two devices each."""
    return two_hosts(2, "evaluation_child", "joined", root)


@pytest.mark.parametrize("command", ["compare", "eval"])
def test_commands_in_two_processes_print_the_figures_of_one(
    processes: list[dict[str, Any]], meshes: dict[str, Any], command: str
) -> None:
    assert processes[1][command] is None, "the second process prints nothing"
    assert_same_figures(processes[0][command], meshes["one"][command])
