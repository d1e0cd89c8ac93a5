"""Several devices and several processes give the results of one device; the communication between devices is counted.

`mesh_child` runs in processes of its own: one with eight devices, and two that are joined.
"""

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
from tests.devices.processes import finish, start, two_hosts
from tests.helpers import hugging_face_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose vocabulary, heads and channels divide by four."""
    root = tmp_path_factory.mktemp("mesh")
    hugging_face_folder(root / "model", vocab_size=96)
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    """The results of one process with eight devices."""
    return finish([start(8, "mesh_child", "devices", root / "model", root)])[0]


@pytest.fixture(scope="module")
def joined(root: Path) -> list[dict[str, Any]]:
    """The results of two joined processes with two devices each."""
    (root / "hosts").mkdir()
    return two_hosts(2, "mesh_child", "hosts", root / "model", root / "hosts")


# ------------------------------------------------------------------------------------------------------ eight devices


@pytest.mark.parametrize("shape", ["8,1", "4,2", "2,4", "1,8", "1,2,4", "odd"])
def test_a_mesh_gives_the_results_of_one_device(results: dict[str, Any], shape: str) -> None:
    """`odd`: neither windows, key/value heads nor vocabulary divide by the devices; channels do."""
    assert max(results["differences"][shape].values()) < 1e-6, results["differences"][shape]


def test_directions_drawn_in_shards_have_the_same_bits(results: dict[str, Any]) -> None:
    assert len(results["directions"]) == 4
    assert all(results["directions"].values()), results["directions"]


def test_estimates_on_a_mesh_are_those_of_one_device(results: dict[str, Any]) -> None:
    """Relative to the largest projected gradient. Losses agree to 1e-6, so central differences to 1e-6 / 2ε."""
    assert results["estimates"]["jvp"] < 1e-5
    assert results["estimates"]["exact"] < 1e-5
    assert results["estimates"]["spsa"] < 1e-3


def test_windows_over_data_communicate_only_their_losses(results: dict[str, Any]) -> None:
    """The paired losses need no communication; the gather sends one number per window, side and direction."""
    assert results["communication"]["8,1"] == {"gaussian": []}
    assert results["communication"]["gather"] == [["all-gather", [2, 2, 8]]]


def test_an_estimate_spreads_its_directions_over_data_if_windows_do_not_divide(results: dict[str, Any]) -> None:
    assert results["directions over data"]["compilations"] == 1
    assert results["directions over data"]["communication"] == []
    assert results["directions over data"]["difference"] < 1e-6


@pytest.mark.parametrize("space", ["gaussian", "rademacher", "low-rank", "gates"])
def test_weights_over_model_communicate_streams_but_never_weights(results: dict[str, Any], space: str) -> None:
    """Residual streams are summed twice per layer (the body of the scan counts once) and once after the embedding."""
    stream = [4, 9, 32]  # the windows of one row of the mesh, positions, hidden size
    operations = results["communication"]["2,4"][space]
    assert {name for name, _ in operations} == {"all-reduce"}
    streams = [shape for _, shape in operations if shape[-3:] == stream]
    assert streams == [stream] * 3
    small = 2 * prod(stream[:2]) * 2  # x · u of low-rank directions, and the sums of a softmax over the vocabulary
    assert all(prod(shape) <= small for _, shape in operations if shape not in streams), operations


@pytest.mark.parametrize("space", ["rademacher", "gates"])
def test_weights_over_fsdp_are_gathered_one_layer_at_a_time(results: dict[str, Any], space: str) -> None:
    """Every matrix once (the body of the scan counts once). The sums are those of `model`."""
    operations = results["communication"]["1,2,4"][space]
    assert {name for name, _ in operations} == {"all-gather", "all-reduce"}
    gathered = sorted(prod(shape) for name, shape in operations if name == "all-gather")
    hidden, heads, channels = 32, 16 // 2, 64 // 2
    assert gathered == sorted([hidden * heads * 4] * 2 + [hidden * heads // 2 * 4] * 2 + [hidden * channels] * 3)
    streams = [shape for name, shape in operations if name == "all-reduce" and shape[-3:] == [2, 9, hidden]]
    assert len(streams) == 3


def test_slicing_in_shards_keeps_bits_and_shards(results: dict[str, Any]) -> None:
    assert results["slices"]["float32"]
    assert results["slices"]["bfloat16"]
    assert results["slices"]["shares"] == results["shares"][0]


def test_a_model_refitted_on_a_mesh_is_that_of_one_device(results: dict[str, Any]) -> None:
    assert results["refitted"]["difference"] < 1e-4
    assert results["refitted"]["shares"] == results["slices"]["shares"]


def test_experts_cut_along_their_width_give_the_results_of_one_device() -> None:
    (found,) = finish([start(8, "mesh_child", "experts")])
    assert found["losses"] < 1e-6
    assert found["kept"]
    assert found["weights"] < 1e-5
    assert found["shard"] == [2, 6, 2, 32]  # a quarter of the width of 8


def test_weights_are_loaded_into_shards(results: dict[str, Any]) -> None:
    """From both formats, no device receives more of a cut array than its shard."""
    for shares in results["shares"]:
        assert {path for path, share in shares.items() if share == [1.0]} == {path for path in shares if "norm" in path}
        assert all(share == [0.25] for path, share in shares.items() if "norm" not in path), shares
    assert results["loaded"] == [True, True, True]


def test_files_written_from_shards_have_the_same_bytes(results: dict[str, Any], root: Path) -> None:
    assert results["loaded"]
    assert_same_files(root / "sharded", root / "single")


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in right.iterdir())
    assert names == sorted(path.name for path in left.iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(joined: list[dict[str, Any]], root: Path) -> None:
    expected = mesh_child.losses(reader.read_model(root / "model").decoder)
    for process in joined:
        assert (process["processes"], process["devices"]) == (2, 4)
        for spread in ("batch", "weights"):
            np.testing.assert_allclose(process[spread], expected, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_give_and_save_the_estimates_of_one(joined: list[dict[str, Any]], root: Path) -> None:
    decoder, tokens = reader.read_model(root / "model").decoder, mesh_child.make_tokens(8, 96)
    gradients = mesh_child.estimates(decoder, tokens)
    for process in joined:
        for spread in ("batch", "weights"):
            for name, expected in gradients.items():
                tolerance = (1e-3 if name == "spsa" else 1e-5) * np.abs(expected).max()
                estimate = np.asarray(process[f"{spread} estimates"][name])
                np.testing.assert_allclose(estimate, expected, rtol=0, atol=tolerance)
    for spread in ("batch", "weights"):
        assert list((root / "hosts" / f"{spread} saved" / "jvp").iterdir()), "both processes saved one checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["batch", "weights"])
def test_process_0_alone_writes_the_same_files(joined: list[dict[str, Any]], root: Path, spread: str) -> None:
    assert [process["writer"] for process in joined] == [True, False]
    writer.write_model(reader.read_model(root / "model"), root / f"{spread} expected")
    assert_same_files(root / "hosts" / spread, root / f"{spread} expected")
    temporary = [path.name for path in (root / "hosts").iterdir() if path.name.startswith(".")]
    assert temporary == []


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_complete(joined: list[dict[str, Any]], root: Path) -> None:
    assert all(process["reloaded"] for process in joined)
    checkpoint, single = reader.read_model(root / "hosts" / "weights flax"), reader.read_model(root / "model")
    writer.write_model(checkpoint, root / "from flax")
    writer.write_model(single, root / "from model")
    weights = "model.safetensors"
    assert (root / "from flax" / weights).read_bytes() == (root / "from model" / weights).read_bytes()


@pytest.mark.slow
def test_an_error_of_process_0_is_raised_in_all_processes(joined: list[dict[str, Any]]) -> None:
    assert len({process["error"] for process in joined}) == 1
    assert "already exists" in joined[0]["error"]


# ------------------------------------------------------------------------------------------------------------ options


def test_meshes_are_parsed() -> None:
    assert sharding.parse_mesh(None) is None
    assert sharding.parse_mesh("auto") is None
    assert sharding.parse_mesh("data=2,model=4") == MeshShape(2, 4)
    assert sharding.parse_mesh("model=4, data=2") == MeshShape(2, 4)
    assert sharding.parse_mesh("model=8") == MeshShape(1, 8)
    assert sharding.parse_mesh("fsdp=4,model=2") == MeshShape(1, 2, 4)


@pytest.mark.parametrize("text", ["", "2,4", "data", "data=0", "data=-1", "data=2,data=2", "rows=2", "data=2;model=4"])
def test_a_malformed_mesh_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match=r"is not understood at .*; expected data=A,model=B"):
        sharding.parse_mesh(text)


def test_one_device_has_no_mesh_and_a_mesh_larger_than_the_devices_is_an_error() -> None:
    assert sharding.make_mesh(None) is None
    with pytest.raises(InputError, match="the mesh is for 8 devices, but there are 1"):
        sharding.make_mesh(MeshShape(2, 4))


def test_hosts_are_parsed() -> None:
    assert hosts.parse_hosts("auto") == Hosts()
    assert hosts.parse_hosts("10.0.0.1:1234,4,3") == Hosts("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize("text", ["", "10.0.0.1,2,0", "10.0.0.1:1234", "10.0.0.1:1234,2,2", "10.0.0.1:1234,2,-1"])
def test_malformed_hosts_are_an_error(text: str) -> None:
    with pytest.raises(InputError, match="expected auto or ADDRESS:PORT,COUNT,NUMBER"):
        hosts.parse_hosts(text)


def test_a_process_with_initialised_devices_cannot_join() -> None:
    sharding.make_mesh(None)  # initialises the devices
    with pytest.raises(InputError, match=r"could not be joined .*--hosts ADDRESS:PORT,COUNT,NUMBER"):
        hosts.initialise_hosts(Hosts("127.0.0.1:1", 2, 0))
