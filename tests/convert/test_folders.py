"""Output folders: addresses, places that cannot be written, room, rights, and what a killed process leaves."""

import dataclasses
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.numpy
from orbax.checkpoint import v1 as orbax

from convert.__main__ import convert
from convert.reader import locate, read_model
from convert.writer import check_new, check_space, new_folder, weight_bytes, write_flax, write_model
from minillm_jax import run
from minillm_jax.errors import InputError, reason
from minillm_jax.model.loaded import Model
from minillm_jax.paths import local_path
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.used import used
from minillm_jax.scoring.gradient.checkpoint import Checkpoint
from tests.helpers import hugging_face_folder

ADDRESSES = ("gs://bucket/out", "s3://bucket/out", "hf://owner/name", "https://host/out", "hdfs:///out", "new+x://a/b")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("dense") / "model"))


def refusal(call: Any, *arguments: Any, **more: Any) -> str:
    """The sentence of the error that a call raises."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **more)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_wherever_a_path_enters(
    model: Model, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen, flags = recipes.with_options(
        recipes.load("ours"), {"checkpoint": address, "criterion": "fms", "ratio": 0.2}
    )
    entries: list[tuple[Any, ...]] = [
        (write_model, model, address),
        (write_flax, model, address),
        (check_new, address),
        (convert, "to-flax", str(model.folder), address),
        (locate, address),
        (convert, "to-torch", address, "out"),
        (Checkpoint, address, {}),
        (used, chosen, flags),
        (recipes.load, f"{address}.toml"),
    ]
    for call, *arguments in entries:
        sentence = refusal(call, *arguments)
        assert "path on this machine" in sentence
        assert "local folder" in sentence or "give owner/name" in sentence
    assert list(tmp_path.iterdir()) == []


def test_addresses_of_the_hub_and_of_files_are_advised_as_names() -> None:
    for address in ("hf://owner/name", "https://huggingface.co/owner/name/tree/main", "hf://datasets/owner/name@main"):
        assert refusal(local_path, address, "model", hub=True).endswith("give owner/name")
    assert refusal(local_path, "file:///a/my%20model", "model").endswith("give /a/my model")
    assert refusal(local_path, "file://localhost/a/b", "model").endswith("give /a/b")
    assert refusal(local_path, Path("gs://bucket/x"), "model").startswith("gs:/bucket/x: ")
    assert local_path("a:/b", "model") == Path("a:/b")
    assert "is no path" in refusal(local_path, "", "model")
    assert "is no path" in refusal(local_path, "a\0b", "model")
    assert "no known home folder" in refusal(local_path, "~no-such-user/x", "model")


# ------------------------------------------------------------------------------------------ places without an output


def test_existing_output_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name, found in (("out", "folder"), ("file", "file"), ("link", "link")):
        sentence = refusal(check_new, tmp_path / name)
        assert sentence == f"{tmp_path / name}: the output {found} already exists; choose another or remove it first"
        with pytest.raises(InputError, match="already exists"), new_folder(tmp_path / name):
            pytest.fail("the block must not run")


def test_places_without_an_output_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    assert refusal(check_new, tmp_path / "file" / "a" / "b").endswith(f"{tmp_path / 'file'} is a file and not a folder")
    assert refusal(check_new, tmp_path / "link" / "a").endswith(f"{tmp_path / 'link'} leads nowhere")
    assert refusal(check_new, tmp_path / ("long" * 100)).endswith("no folder can be made there (File name too long)")
    assert "the output folder '' is no path" in refusal(check_new, "")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory cannot be found" in refusal(check_new, "out")
    check_new(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_output_in_the_folder_of_the_model_is_refused_before_work(model: Model, tmp_path: Path) -> None:
    folder = shutil.copytree(model.folder, tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    inside = "lies in the folder of the model"
    for output in (folder, folder / "out", tmp_path / "link" / "deeper" / "out"):
        assert inside in refusal(convert, "to-flax", str(folder), str(output))
        assert inside in refusal(write_model, read_model(folder), output)
    job = run.Job(str(folder), str(folder / "out"), recipe_with_text())
    assert inside in refusal(run.run, job)


def recipe_with_text() -> recipes.Recipe:
    return recipes.with_options(recipes.load("ours"), {"calibration": "missing.txt", "ratio": 0.2})[0]


def test_names_of_any_characters_get_a_scratch_folder(tmp_path: Path) -> None:
    for name in ("\N{SNOWMAN}" * 83, "a\nb", "x" * 250, "\udcff" * 200):
        with new_folder(tmp_path / name) as scratch:
            (scratch / "file").write_text("complete")
        assert (tmp_path / name / "file").read_text() == "complete"


# ------------------------------------------------------------------------------------------------------------ room


def test_missing_room_is_said_before_work(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = weight_bytes(model)
    stored = sum(file.stat().st_size for file in model.folder.glob("*.safetensors"))
    assert 0.9 * stored < needed < stored
    asked = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(total=10**9, free=needed - 1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    output = tmp_path / "new" / "out"
    for call in (
        lambda: check_space(output, needed),
        lambda: write_model(model, output),
        lambda: write_flax(model, output),
    ):
        sentence = refusal(call)
        assert sentence.startswith(f"{output}: the folder needs ")
        assert f"but {tmp_path} has " in sentence
        assert "free some space or choose another output folder" in sentence
    assert set(asked) == {tmp_path}
    assert list(tmp_path.iterdir()) == []
    check_space(output, needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_space(output, needed)  # a file system that does not say


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FULL, "(No space left on device)"),
        (
            OSError(errno.EACCES, "Permission denied", "/some/folder/tokenizer.json"),
            "(tokenizer.json: Permission denied)",
        ),
        (shutil.Error([("/a/tokenizer.json", "/b", "No space left on device")]), "(tokenizer.json: No space left"),
    ],
)
def test_errors_of_the_file_system_are_one_sentence(tmp_path: Path, error: OSError, words: str) -> None:
    def write() -> None:
        with new_folder(tmp_path / "new" / "out", needed=3 * 10**9):
            raise error

    sentence = refusal(write)
    assert words in sentence
    assert sentence.startswith(f"{tmp_path / 'new' / 'out'}: cannot be written (")
    assert "the folder needs 3 GB, and " in sentence
    assert list(tmp_path.iterdir()) == []


# TensorStore's and safetensors' errors on a full disk, as they raise them.
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Failed writing: "/out/state/d/014e": Failed to write 440874 bytes to file 11: '
    "No space left on device [os_error_code='28'] [tensorstore_spec='{\\\"context\\\"...}']"
)
SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"


def test_errors_of_safetensors_and_orbax_are_one_sentence(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise ValueError(TENSORSTORE)

    def full_too(*arguments: Any, **more: Any) -> None:
        raise safetensors.SafetensorError(SAFETENSORS)

    monkeypatch.setattr(orbax, "save", full)
    monkeypatch.setattr(safetensors.numpy, "serialize_file", full_too)
    sentence = refusal(write_model, model, tmp_path / "out")
    assert "cannot be written (model.safetensors: No space left on device); the folder needs " in sentence
    sentence = refusal(write_flax, model, tmp_path / "out")
    assert "cannot be written (flax_weights: No space left on device); the folder needs " in sentence
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    record: dict[str, Any] = {"set": {1, 2}}
    broken = dataclasses.replace(model, record=record)
    assert "pruning.json: cannot be written as JSON" in refusal(write_model, broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- rights


@pytest.fixture
def umask() -> Iterator[Any]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_the_umask_decides_who_can_read(model: Model, tmp_path: Path, umask: Any, mask: int) -> None:
    umask(mask)
    write_model(model, tmp_path / "out", extra={"README.md": "text"})
    write_flax(model, tmp_path / "flax")
    for path in [tmp_path / "out", tmp_path / "flax", *(tmp_path / "out").rglob("*"), *(tmp_path / "flax").rglob("*")]:
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


# ------------------------------------------------------------------------------------------------------- leftovers


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_leftovers_of_killed_processes_are_removed_and_others_are_not(tmp_path: Path) -> None:
    """`sleep` stands for a process that writes, because its number and start time are all that is read of it."""
    with new_folder(tmp_path / "first") as scratch:
        (tmp_path / "kept").mkdir()
        host, pid, started, token = scratch.name.rpartition(".minillm-jax-")[2].split("-")
        assert pid == str(os.getpid())
        check_new(tmp_path / "second")
        assert scratch.exists()
    child = subprocess.Popen(["sleep", "600"])
    try:
        started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        living = tmp_path / f".out.minillm-jax-{host}-{child.pid}-{started}-{token}"
        others = [
            f".out.minillm-jax-{'0' * 8}-{child.pid}-1-{token}",  # of another host
            ".out.x8d7f2",
            f"out.minillm-jax-{host}-{child.pid}-1-{token}",
        ]
        earlier = tmp_path / f".out.minillm-jax-{host}-{child.pid}-{int(started) - 1}-{token}"  # its number came again
        for folder in (living.name, *others, earlier.name):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "file").write_text("half")
        link = tmp_path / f".out.minillm-jax-{host}-{child.pid}-1-{token[::-1]}"
        link.symlink_to(tmp_path / "kept")
        check_new(tmp_path / "second")
        assert {path.name for path in tmp_path.iterdir()} == {"first", "kept", living.name, *others, link.name}
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, but not yet gone
        with new_folder(tmp_path / "second"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "kept", *others, link.name}
    finally:
        child.kill()
        child.wait()


def test_files_and_folders_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folders, then the rename, then the folder above."""
    steps, fsync, rename = [], os.fsync, Path.rename

    def synced(handle: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)  # noqa: PTH115  no path of the file system
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "file").write_text("x")
        (scratch / "other").write_text("x")
    assert steps == ["file", "inner", "other", scratch.name, "rename", tmp_path.name]


def test_sizes_and_reasons_are_short() -> None:
    assert (
        reason(ValueError("DATA_LOSS: Error opening: Encoded length is 2 [tensorstore_spec='{}']"))
        == "Encoded length is 2"
    )
    assert reason(ValueError("First. Second.")) == "First"
    assert reason(FULL) == "No space left on device"
    assert len(reason(ValueError("x" * 1000))) == 200
