"""Files beside the weights: what is copied, what is left out and named, and what the Hub client fetches."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from convert.reader import locate, read_model
from convert.writer import write_model
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.loaded import Model
from tests.helpers import hugging_face_folder

COPIED = {
    "LICENSE": "terms",
    "NOTICE": "notice",
    "USE_POLICY.md": "policy",
    "generation_config.json": '{"temperature": 0.5}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "original/params.json": "{}",
    "tokenization_own.py": "code of a tokenizer",
    "preprocessor_config.json": "{}",
}
REPLACED = {
    "README.md": "the card of the dense model",
    "report.json": "{}",
    "recipe.toml": "",
    "modeling_own.py": "code of the model",
    "configuration_own.py": "code of the model",
    "consolidated.safetensors": "weights",
    "pytorch_model.bin.index.json": "{}",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "model-q4.gguf": "weights",
    "onnx/model.onnx": "weights",
    "original/consolidated.00.pth": "weights",
    "adapter_config.json": "{}",
    "optimizer.pt": "state",
    "trainer_state.json": "{}",
    "checkpoint-10/rng_state.pth": "state",
    "runs/today/events.out.tfevents.1": "state",
    ".gitattributes": "",
    ".cache/huggingface/x": "",
    "__pycache__/x.pyc": "",
    "other-model/config.json": "{}",
    "other-model/LICENSE": "of another model",
}


def add_files(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("dense") / "model", num_hidden_layers=1))


@pytest.fixture
def model(dense: Model, tmp_path: Path) -> Model:
    """The model as if it had been read from the folder `source`, which has no files yet but config.json."""
    add_files(tmp_path / "source", {"config.json": json.dumps(dense.raw_config)})
    return replace(dense, folder=tmp_path / "source")


@pytest.mark.parametrize("format_name", ["stock", "flax"])
def test_every_file_is_copied_unless_it_is_replaced(model: Model, tmp_path: Path, format_name: str) -> None:
    add_files(model.folder, COPIED | REPLACED)
    write_model(model, tmp_path / "out", format_name, extra={"README.md": "the new card"})
    written = names(tmp_path / "out")
    weights = {name for name in written if name.startswith(("flax_weights/", "model.safetensors"))}
    assert written - weights == {*COPIED, "config.json", "README.md"}
    assert (tmp_path / "out" / "README.md").read_text() == "the new card"
    for name, content in COPIED.items():
        assert (tmp_path / "out" / name).read_text() == content


def test_files_of_the_writer_take_precedence(model: Model, tmp_path: Path) -> None:
    """Names differ in case only on some file systems; no file of the input is in the way of a written one."""
    add_files(model.folder, {"NOTICE": "old", "Readme.md": "old", "report.HTML": "old", "LICENSE": "terms"})
    write_model(model, tmp_path / "out", extra={"NOTICE": "new", "README.md": "new", "report.html": "new"})
    assert names(tmp_path / "out") == {
        *("config.json", "model.safetensors", "LICENSE", "NOTICE", "README.md", "report.html"),
    }
    assert (tmp_path / "out" / "NOTICE").read_text() == "new"


def test_what_is_not_copied_is_named(model: Model, tmp_path: Path) -> None:
    """Links that leave the folder, pipes, large files, archives and binary files in subfolders."""
    add_files(model.folder, {"LICENSE": "terms", "notes/data": "a\0b"})
    add_files(tmp_path / "elsewhere", {"secret.txt": "secret"})
    (model.folder / "NOTICE").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    (model.folder / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(InputWarning) as caught:
        write_model(model, tmp_path / "first")
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in ("NOTICE (a link to a file outside", "notes/data (not a text file)", "folder (a link to a folder)"):
        assert part in text
    assert text.endswith("copy by hand what the written model needs")
    assert names(tmp_path / "first") == {"config.json", "model.safetensors", "LICENSE"}

    for path in ("NOTICE", "folder"):
        (model.folder / path).unlink()
    shutil.rmtree(model.folder / "notes")
    os.mkfifo(model.folder / "pipe")
    add_files(model.folder, {"data.tar.gz": "archive"})
    with (model.folder / "huge.txt").open("wb") as file:
        file.truncate(201 * 2**20)  # a hole, which takes no space
    (model.folder / "broken").symlink_to("nowhere")
    (model.folder / "loop").symlink_to("loop")
    match = r"broken \(no such file.*data.tar.gz \(0.0 MB\), huge.txt \(210.8 MB\), loop \(.*pipe \(not a regular file"
    with pytest.warns(InputWarning, match=match):
        write_model(model, tmp_path / "second")
    assert names(tmp_path / "second") == {"config.json", "model.safetensors", "LICENSE"}


def test_a_long_list_is_cut(model: Model, tmp_path: Path) -> None:
    add_files(model.folder, {f"{letter}.zip": "" for letter in "abcdefgh"})
    with pytest.warns(InputWarning, match=r"e.zip \(0.0 MB\), 3 more; copy by hand"):
        write_model(model, tmp_path / "out")


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(model: Model, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / ("0a" * 20)
    add_files(cache / "blobs", {"b1": "terms", "b2": json.dumps(model.raw_config)})
    add_files(snapshot, {"notes.txt": "notes"})
    (snapshot / "LICENSE").symlink_to("../../blobs/b1")
    (snapshot / "config.json").symlink_to("../../blobs/b2")
    (snapshot / "NOTICE").symlink_to("notes.txt")
    write_model(replace(model, folder=snapshot), tmp_path / "out")
    for name, content in {"LICENSE": "terms", "NOTICE": "notes", "notes.txt": "notes"}.items():
        assert (tmp_path / "out" / name).read_text() == content
        assert not (tmp_path / "out" / name).is_symlink()


def test_an_unreadable_file_does_not_lose_the_weights(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "NOTICE":
            Path(target).write_text("half")
            raise PermissionError(13, "Permission denied", str(source))
        copy(source, target)

    add_files(model.folder, {"LICENSE": "terms", "NOTICE": "notice"})
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.warns(
        InputWarning, match=r"source: not copied beside the weights: NOTICE \(permission denied\); copy by"
    ):
        write_model(model, tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "model.safetensors", "LICENSE"}


# --------------------------------------------------------------------------------------------------------- the Hub


def fake_hub(repository: Path, cache: Path) -> Callable[..., str]:
    """A Hub client that copies the files which match the patterns."""

    def snapshot_download(name: str, revision: str | None, **patterns: list[str]) -> str:
        for path in huggingface_hub.utils.filter_repo_objects(sorted(names(repository)), **patterns):
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / path, cache / path)
        return str(cache)

    return snapshot_download


def test_the_hub_client_fetches_the_same_files(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(model, tmp_path / "repository")
    add_files(tmp_path / "repository", COPIED | REPLACED | {"data.zip": "archive"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub(tmp_path / "repository", tmp_path / "cache"))
    read_model("owner/name")
    others = {"report.json", "recipe.toml", "other-model/config.json", "other-model/LICENSE"}  # small, and not copied
    assert names(tmp_path / "cache") == {*COPIED, *others, "config.json", "model.safetensors"}


def test_an_incomplete_cache_is_enough_without_a_connection(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub client refuses a snapshot without its licence, which is no reason to refuse the model."""
    write_model(model, tmp_path / "cache")

    def snapshot_download(name: str, revision: str | None, **patterns: list[str]) -> str:
        if "ignore_patterns" in patterns:
            raise errors.IncompleteSnapshotError("1 file is missing", snapshot_path=str(tmp_path / "cache"))
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.warns(InputWarning, match="owner/name: the Hub cannot be reached, and its cache lacks some files"):
        assert read_model("owner/name").folder == tmp_path / "cache"
    (tmp_path / "cache" / "config.json").unlink()
    with pytest.raises(InputError, match="the Hub could not provide it"):
        locate("owner/name")


RESPONSE = httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "offline", "advice"),
    [
        (
            errors.GatedRepoError("no", response=RESPONSE),
            False,
            r"accept the terms at https://huggingface.co/owner/name",
        ),
        (
            errors.RepositoryNotFoundError("no", response=RESPONSE),
            False,
            "no such model, or it is private; check the name",
        ),
        (errors.RevisionNotFoundError("no", response=RESPONSE), False, "the model has no revision v9"),
        (errors.LocalEntryNotFoundError("set local_files_only"), True, "HF_HUB_OFFLINE forbids a download"),
        (errors.LocalEntryNotFoundError("set local_files_only"), False, "no connection, and the cache lacks the model"),
    ],
)
def test_the_reason_of_a_failed_download_is_one_that_helps(
    monkeypatch: pytest.MonkeyPatch, error: Exception, offline: bool, advice: str
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError, match=advice) as caught:
        locate("owner/name", revision="v9")
    assert "local_files_only" not in str(caught.value)


def test_a_folder_of_very_many_files_is_not_copied_whole(model: Model, tmp_path: Path) -> None:
    add_files(model.folder, {"LICENSE": "terms"} | {f"notes/{number:03}.txt": "" for number in range(502)})
    with pytest.warns(InputWarning, match=r"notes/499.txt and all further files \(there are more than 500 files\)"):
        write_model(model, tmp_path / "out")
    assert len(names(tmp_path / "out")) == 502
