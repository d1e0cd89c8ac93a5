"""Many devices and several processes give what one device gives; what they send each other is counted.

The work is done by `mesh_child` in processes of their own: once for eight devices, and once for two processes.
"""

import json
import os
import socket
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import reader, writer
from minillm_jax.devices import hosts, sharding
from minillm_jax.devices.hosts import Hosts
from minillm_jax.devices.sharding import MeshShape
from minillm_jax.errors import InputError
from tests.devices import mesh_child
from tests.helpers import hugging_face_folder

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds, after which a process that waits for another is stopped


def start(devices: int, name: str, *arguments: object) -> subprocess.Popen[str]:
    """A process with that many devices that runs a function of `mesh_child`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.devices.mesh_child", name, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(children: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What each process found; all of them are stopped when one takes too long."""
    try:
        said = [child.communicate(timeout=PATIENCE) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, errors) in zip(children, said, strict=True):
        assert child.returncode == 0, errors[-5000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, whose vocabulary, heads and channels divide by four."""
    root = tmp_path_factory.mktemp("mesh")
    hugging_face_folder(root / "model", vocab_size=96)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What eight devices of one process found."""
    return finish([start(8, "devices", root / "model", root)])[0]


@pytest.fixture(scope="module")
def joined(root: Path) -> list[dict[str, Any]]:
    """What two processes of two devices found."""
    (root / "hosts").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return finish([start(2, "hosts", root / "model", root / "hosts", f"{address},2,{n}") for n in (0, 1)])


# ------------------------------------------------------------------------------------------------------ eight devices


@pytest.mark.parametrize("shape", ["8,1", "4,2", "2,4", "1,8", "odd"])
def test_a_mesh_gives_the_results_of_one_device(found: dict[str, Any], shape: str) -> None:
    """`odd`: neither sequences, key/value heads nor vocabulary divide; channels do."""
    assert max(found["apart"][shape].values()) < 1e-6, found["apart"][shape]


def test_directions_made_in_shards_have_the_same_bits(found: dict[str, Any]) -> None:
    assert len(found["directions"]) == 4
    assert all(found["directions"].values()), found["directions"]


def test_whole_estimates_on_a_mesh_are_those_of_one_device(found: dict[str, Any]) -> None:
    """Relative to the largest projected gradient; losses agree to 1e-6, so central differences to that over 2ε."""
    assert found["estimates"]["jvp"] < 1e-5
    assert found["estimates"]["exact"] < 1e-5
    assert found["estimates"]["spsa"] < 1e-3


def test_over_data_a_direction_costs_its_scalars(found: dict[str, Any]) -> None:
    """Finding the losses sends nothing at all, and fetching them one number for each sequence, side and direction."""
    assert found["sent"]["8,1"] == {"gaussian": []}
    assert found["sent"]["gather"] == [["all-gather", [2, 2, 8]]]
    assert found["directions over data"]["sent"] == []
    assert found["directions over data"]["apart"] < 1e-6


@pytest.mark.parametrize("space", ["gaussian", "rademacher", "low-rank", "gates"])
def test_over_model_streams_are_sent_and_never_weights(found: dict[str, Any], space: str) -> None:
    """Two sums of the residual stream a layer (the scan's body is there once), one of the embedding, and the head's."""
    stream = [4, 9, 32]  # the sequences of one row of the mesh, positions, hidden size
    sent = found["sent"]["2,4"][space]
    assert {name for name, _ in sent} == {"all-reduce"}
    streams = [shape for _, shape in sent if shape[-3:] == stream]
    assert streams == [stream] * 3
    thin = 2 * prod(stream[:2]) * 2  # x · u of low-rank directions, and the sums of a softmax over the vocabulary
    assert all(prod(shape) <= thin for _, shape in sent if shape not in streams), sent


def test_slicing_in_shards_keeps_bits_and_shards(found: dict[str, Any]) -> None:
    assert found["slices"]["float32"]
    assert found["slices"]["bfloat16"]
    assert found["slices"]["shares"] == found["shares"][0]


def test_a_model_restored_on_a_mesh_is_that_of_one_device(found: dict[str, Any]) -> None:
    assert found["refitted"]["apart"] < 1e-4
    assert found["refitted"]["shares"] == found["slices"]["shares"]


def test_weights_are_loaded_into_shards(found: dict[str, Any]) -> None:
    """From both kinds of folders: no device is given more of a cut array than its part."""
    for shares in found["shares"]:
        assert {path for path, share in shares.items() if share == [1.0]} == {path for path in shares if "norm" in path}
        assert all(share == [0.25] for path, share in shares.items() if "norm" not in path), shares
    assert found["loaded"] == [True, True, True]


def test_files_from_shards_are_the_same_bytes(found: dict[str, Any], root: Path) -> None:
    assert found["loaded"]
    assert_same_files(root / "sharded", root / "single")


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in right.iterdir())
    assert names == sorted(path.name for path in left.iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ two processes


def test_two_processes_give_the_results_of_one(joined: list[dict[str, Any]], root: Path) -> None:
    alone = mesh_child.losses(reader.read_model(root / "model").decoder)
    for one in joined:
        assert (one["processes"], one["devices"]) == (2, 4)
        for spread in ("batch", "weights"):
            np.testing.assert_allclose(one[spread], alone, rtol=1e-6)


def test_two_processes_give_the_estimates_of_one_and_save_them(joined: list[dict[str, Any]], root: Path) -> None:
    decoder, tokens = reader.read_model(root / "model").decoder, mesh_child.make_tokens(8, 96)
    alone = mesh_child.estimates(decoder, tokens)
    for one in joined:
        for spread in ("batch", "weights"):
            for name, expected in alone.items():
                found, tolerance = np.asarray(one[f"{spread} estimates"][name]), 1e-3 if name == "spsa" else 1e-5
                np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    for name in ("batch", "weights"):
        assert list((root / "hosts" / f"{name} saved" / "jvp").iterdir()), "both processes saved one checkpoint"


@pytest.mark.parametrize("spread", ["batch", "weights"])
def test_process_0_alone_writes_the_same_files(joined: list[dict[str, Any]], root: Path, spread: str) -> None:
    assert [one["writer"] for one in joined] == [True, False]
    writer.write_model(reader.read_model(root / "model"), root / f"{spread} by hand")
    assert_same_files(root / "hosts" / spread, root / f"{spread} by hand")
    left_over = [path.name for path in (root / "hosts").iterdir() if path.name.startswith(".")]
    assert left_over == []


def test_a_checkpoint_of_both_processes_is_whole(joined: list[dict[str, Any]], root: Path) -> None:
    assert all(one["same"] for one in joined)
    together, single = reader.read_model(root / "hosts" / "weights flax"), reader.read_model(root / "model")
    writer.write_model(together, root / "from flax")
    writer.write_model(single, root / "from model")
    weights = "model.safetensors"
    assert (root / "from flax" / weights).read_bytes() == (root / "from model" / weights).read_bytes()


def test_what_process_0_refuses_all_refuse(joined: list[dict[str, Any]]) -> None:
    assert len({one["refused"] for one in joined}) == 1
    assert "already exists" in joined[0]["refused"]


# ---------------------------------------------------------------------------------------------------------- the words


def test_meshes_are_read() -> None:
    assert sharding.parse_mesh(None) is None
    assert sharding.parse_mesh("auto") is None
    assert sharding.parse_mesh("data=2,model=4") == MeshShape(2, 4)
    assert sharding.parse_mesh("model=4, data=2") == MeshShape(2, 4)
    assert sharding.parse_mesh("model=8") == MeshShape(1, 8)


@pytest.mark.parametrize("text", ["", "2,4", "data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;model=4"])
def test_meshes_that_are_not_understood(text: str) -> None:
    with pytest.raises(InputError, match=r"is not understood at .*; expected data=A,model=B"):
        sharding.parse_mesh(text)


def test_one_device_needs_no_mesh_and_two_are_not_there() -> None:
    assert sharding.make(None) is None
    with pytest.raises(InputError, match="the mesh is for 8 devices, but there are 1"):
        sharding.make(MeshShape(2, 4))


def test_hosts_are_read() -> None:
    assert hosts.parse_hosts("auto") == Hosts()
    assert hosts.parse_hosts("10.0.0.1:1234,4,3") == Hosts("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize("text", ["", "10.0.0.1,2,0", "10.0.0.1:1234", "10.0.0.1:1234,2,2", "10.0.0.1:1234,2,-1"])
def test_hosts_that_are_not_understood(text: str) -> None:
    with pytest.raises(InputError, match="expected auto or ADDRESS:PORT,COUNT,NUMBER"):
        hosts.parse_hosts(text)


def test_a_process_that_has_devices_cannot_join() -> None:
    sharding.make(None)  # asks for the devices
    with pytest.raises(InputError, match=r"could not be joined .*--hosts ADDRESS:PORT,COUNT,NUMBER says"):
        hosts.initialise_hosts(Hosts("127.0.0.1:1", 2, 0))
