"""Whole runs on several devices and in two processes come to the result of one device; the walk shares its work.

`jobs_child` runs in processes of its own.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.devices.jobs_child import JOBS, QUICK, run_job
from tests.devices.processes import finish, start, two_hosts
from tests.helpers import hugging_face_folder, random_tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose heads and channels divide by four, a text, another text, and all runs' outputs."""
    root = tmp_path_factory.mktemp("jobs")
    hugging_face_folder(root / "model", vocab_size=96, num_hidden_layers=3, num_key_value_heads=8)
    np.save(root / "tokens.npy", random_tokens(96, 400))
    (root / "other").mkdir()
    np.save(root / "other" / "tokens.npy", random_tokens(96, 400, seed=1))
    (root / "out").mkdir()
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> Path:
    """The folders of all runs on one device."""
    for name in QUICK:
        run_job(str(root), name, root / "single" / name)
    return root / "single"


@pytest.fixture(scope="module")
def more_expected(root: Path, expected: Path) -> Path:
    """With the folders of the slow runs."""
    for name in JOBS.keys() - set(QUICK):
        run_job(str(root), name, expected / name)
    return expected


@pytest.fixture(scope="module")
def joined(root: Path) -> list[dict[str, Any]]:
    """Two joined processes, with every weight shared between the devices of both."""
    return two_hosts(2, "jobs_child", "jobs", root, root / "out", "model", "+".join(QUICK))


@pytest.fixture(scope="module")
def either(root: Path) -> list[dict[str, Any]]:
    """Two joined processes: windows shared between the devices of both, then weights, then both axes."""
    (root / "out" / "either").mkdir()
    return two_hosts(2, "jobs_child", "jobs", root, root / "out" / "either", "data+model+both+fsdp", "+".join(JOBS))


@pytest.fixture(scope="module")
def walk() -> dict[str, Any]:
    """One process with eight devices."""
    return finish([start(8, "jobs_child", "walk")])[0]


def assert_same_result(output: Path, expected: Path) -> None:
    """Equal groups, weights equal to 1e-5 of the largest, and equal perplexities."""
    records = [json.loads((folder / "pruning.json").read_text()) for folder in (output, expected)]
    assert records[0]["kept"] == records[1]["kept"]
    assert records[0]["whole"] == records[1]["whole"]
    left, right = (load_file(folder / "model.safetensors") for folder in (output, expected))
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        np.testing.assert_allclose(left[name], tensor, rtol=0, atol=1e-5 * max(1, np.abs(tensor).max()), err_msg=name)


@pytest.mark.parametrize("name", QUICK)
def test_a_run_in_two_processes_is_that_of_one_device(
    joined: list[dict[str, Any]], root: Path, expected: Path, name: str
) -> None:
    """Although the second process would decide otherwise, with other solutions, choices and orders."""
    assert [process["writer"] for process in joined] == [True, False]
    assert_same_result(root / "out" / f"model {name}", expected / name)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "model", "both", "fsdp"])
@pytest.mark.parametrize("name", JOBS)
def test_every_run_on_every_mesh_is_that_of_one_device(
    either: list[dict[str, Any]], root: Path, more_expected: Path, name: str, mesh: str
) -> None:
    assert len(either) == 2
    assert_same_result(root / "out" / "either" / f"{mesh} {name}", more_expected / name)


def test_process_0_alone_decides_when_to_save(joined: list[dict[str, Any]], root: Path) -> None:
    """By its own clock, the second process would save at the end only, and leave process 0 waiting."""
    assert joined[0]["projected"] == joined[1]["projected"]
    assert list((root / "out" / "two clocks").iterdir()), "both processes saved one checkpoint"


def test_processes_with_other_settings_or_texts_stop_together(joined: list[dict[str, Any]], root: Path) -> None:
    for process in joined:
        assert "the settings of process 1 are not those of process 0" in process["errors"][0]
        assert "the calibration windows of process 1 are not those of process 0" in process["errors"][1]
    assert not (root / "out" / "mixed").exists()


@pytest.mark.parametrize("mesh", ["data", "model", "both"])
def test_the_walk_on_a_mesh_prunes_as_on_one_device(walk: dict[str, Any], mesh: str) -> None:
    assert walk["meshes"][mesh]["kept"]
    assert walk["meshes"][mesh]["difference"] < 1e-5


def test_finished_layers_stay_in_their_shards_during_the_walk(walk: dict[str, Any]) -> None:
    assert walk["bytes"]["sublayers"] == 4
    assert walk["bytes"]["largest share"] == 1 / 4  # the groups are halved, and no longer divide by eight


def test_a_model_is_known_on_every_mesh(walk: dict[str, Any]) -> None:
    """An estimate that began on one mesh may continue on another."""
    assert walk["same model"]


@pytest.mark.parametrize(("mesh", "devices"), [("data", 8), ("model", 8), ("both", 8)])
@pytest.mark.parametrize("program", ["advance", "inputs", "moments"])
def test_devices_share_the_operations_of_the_walk(walk: dict[str, Any], mesh: str, devices: int, program: str) -> None:
    """Norms and sums of every feature are repeated over `model`."""
    assert walk["operations"][mesh][program] < 1.5 / devices
