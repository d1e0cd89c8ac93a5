"""A recovery on several devices, and in two processes, is that of one device."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minillm_jax import api
from tests.devices.processes import finish, start, two_hosts
from tests.devices.recovery_child import METHODS, recover_folder
from tests.helpers import hugging_face_folder, random_tokens


@cache
def losses(mesh: str) -> dict[str, Any]:
    """The losses of a recovery in a process with four virtual devices."""
    return finish([start(4, "recovery_child", "losses", mesh)])[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,model=2", "data=4", "model=4"])
def test_a_mesh_gives_the_losses_of_one_device(mesh: str) -> None:
    one, many = losses("auto"), losses(mesh)
    for method, found in many.items():
        expected = np.asarray(one[method], dtype=float)
        # The refit multiplies the differences between float32 moments whose sums have another order.
        tolerance = 1e-4 if method == "refit" else 3e-6
        np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=tolerance, err_msg=method)
        assert expected[-1, 1] != expected[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4", "data=2,model=2"])
def test_two_processes_write_the_folder_of_one_device(tmp_path: Path, mesh: str) -> None:
    hugging_face_folder(tmp_path / "model", vocab_size=96, num_hidden_layers=3, num_key_value_heads=8)
    np.save(tmp_path / "tokens.npy", random_tokens(96, 400))
    model = api.load(tmp_path / "model")
    api.save(api.prune(model, random_tokens(96, 400), 0.5, criterion="magnitude", seq_len=16), tmp_path / "pruned")
    assert [found["writer"] for found in two_hosts(2, "recovery_child", "joined", tmp_path, mesh)] == [True, False]
    for method in METHODS:
        recover_folder(str(tmp_path), method, str(tmp_path / method))
        found, expected = (tmp_path / f"{mesh} {method}", tmp_path / method)
        assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
        for name in ("model.safetensors", *(["adapter/adapter_model.safetensors"] if method == "lora" else [])):
            left, right = load_file(found / name), load_file(expected / name)
            assert left.keys() == right.keys()
            for key, tensor in right.items():
                np.testing.assert_allclose(
                    left[key], tensor, rtol=0, atol=2e-5 * max(1, np.abs(tensor).max()), err_msg=key
                )
        records = [json.loads((folder / "pruning.json").read_text())["recovery"] for folder in (found, expected)]
        losses_of = [[[point["validation"], point["watched"]] for point in record["points"]] for record in records]
        np.testing.assert_allclose(*losses_of, rtol=1e-4 if method == "refit" else 1e-5)
        assert not list(tmp_path.glob("*.checkpoint"))
