"""Tensor sources: PyTorch files give the same weights as safetensors, and other contents raise an `InputError`."""

import builtins
import itertools
import json
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import memory, rules
from convert.reader import locate, read_model
from convert.sources import INDEX, SINGLE, TORCH_INDEX, TORCH_SINGLE, SafetensorsFolder, TorchFolder, open_folder
from minillm_jax.errors import InputError
from minillm_jax.model.build import build
from minillm_jax.model.families import parse
from minillm_jax.model.tree import named_arrays
from tests.helpers import arrays_equal, hugging_face_folder

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"

Tensors = dict[str, Any]

BOTH_FORMATS = pytest.mark.parametrize(
    ("save", "single", "index"), [(torch.save, TORCH_SINGLE, TORCH_INDEX), (save_file, SINGLE, INDEX)]
)


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense folder with `pytorch_model.bin` instead of safetensors."""
    copy = Path(shutil.copytree(dense, tmp_path / "model"))
    torch.save(load_file(copy / SINGLE), copy / TORCH_SINGLE)
    (copy / SINGLE).unlink()
    return copy


def rewrite(folder: Path, change: Callable[[Tensors], object], **save_options: Any) -> None:
    """Apply a change to the tensors of `pytorch_model.bin`."""
    tensors = torch.load(folder / TORCH_SINGLE, weights_only=True)
    change(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that quantised types are deprecated
        torch.save(tensors, folder / TORCH_SINGLE, **save_options)


def split(folder: Path, save: Callable[[Tensors, Path], object], single: str, index: str) -> dict[str, str]:
    """Replace `pytorch_model.bin` by two shards and an index file, in either format; returns the weight map."""
    tensors = torch.load(folder / TORCH_SINGLE, weights_only=True)
    (folder / TORCH_SINGLE).unlink()
    stem, suffix = single.rsplit(".", 1)
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_file_gives_the_same_weights_as_safetensors(dense: Path, folder: Path, zipped: bool) -> None:
    """The zip format and the format before PyTorch 1.6, which cannot be mapped."""
    rewrite(folder, lambda tensors: None, _use_new_zipfile_serialization=zipped)
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


@BOTH_FORMATS
def test_shards_give_the_same_weights_as_one_file(
    dense: Path, folder: Path, save: Any, single: str, index: str
) -> None:
    split(folder, save, single, index)
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_read_bit_for_bit(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    save_file(torch.load(folder / TORCH_SINGLE, weights_only=True), folder / SINGLE)
    torch_source, safetensors_source = TorchFolder(folder), SafetensorsFolder(folder)
    for name in safetensors_source.names():
        left, right = torch_source.read(name), safetensors_source.read(name)
        assert left.dtype == right.dtype == np.dtype(str(dtype).removeprefix("torch."))
        assert left.tobytes() == right.tobytes(), name


def test_tensors_with_any_strides_are_read(dense: Path, folder: Path) -> None:
    rewrite(
        folder, lambda tensors: tensors.update({key: t.mT.contiguous().mT for key, t in tensors.items() if t.ndim > 1})
    )
    rewrite(folder, lambda tensors: tensors.update({UP: torch.stack([tensors[UP]] * 3, -1)[..., 1]}))
    assert not torch.load(folder / TORCH_SINGLE, weights_only=True)[UP].is_contiguous()
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


def test_parameters_are_read_as_tensors(dense: Path, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.nn.Parameter(t) for name, t in tensors.items()}))
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


def test_head_that_is_a_view_of_the_embedding(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path / "model", tie_word_embeddings=True)
    expected = read_model(folder).decoder
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / TORCH_SINGLE)
    assert arrays_equal(read_model(folder).decoder, expected)


def test_weights_do_not_change_when_the_file_changes(dense: Path, folder: Path) -> None:
    """The file is mapped and JAX aliases aligned memory on the CPU, so without a copy they would change."""
    decoder = read_model(folder).decoder
    with (folder / TORCH_SINGLE).open("r+b") as file:
        file.write(b"\xff" * (folder / TORCH_SINGLE).stat().st_size)
    assert arrays_equal(decoder, read_model(dense).decoder)


def test_ignored_buffers_may_have_any_type(dense: Path, folder: Path) -> None:
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.eye(4, dtype=torch.int64).to_sparse()}))
    assert arrays_equal(read_model(folder).decoder, read_model(dense).decoder)


def test_safetensors_take_precedence_over_pytorch_files_and_single_files_over_index_files(
    dense: Path, folder: Path
) -> None:
    (folder / TORCH_INDEX).write_text("{")
    assert isinstance(open_folder(folder), TorchFolder)
    (folder / TORCH_SINGLE).write_bytes(b"")
    (folder / INDEX).write_text("{")
    shutil.copyfile(dense / SINGLE, folder / SINGLE)
    assert isinstance(open_folder(folder), SafetensorsFolder)


# ------------------------------------------------------------------------------------------------------- bad input


class Code:
    """Content of a hostile file: unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (builtins.eval, (f"open({str(self.path)!r}, 'w').write('ran')",))


def quantised(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that quantised types are deprecated
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# Name of a change → the change of the tensors, and the pattern of the error message.
CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "nested": (
        lambda t: t.update({"model": dict(t)}),
        r"pytorch_model\.bin: expected a dictionary of tensors, found dict under 'model'",
    ),
    "number": (lambda t: t.update({"epoch": 3}), r"expected a dictionary of tensors, found int under 'epoch'"),
    "numbered": (lambda t: t.update({3: t[NORM]}), r"expected a dictionary of tensors, found Tensor under 3"),
    "integers": (
        lambda t: t.update({NORM: t[NORM].to(torch.int8)}),
        r"'model\.norm\.weight' is int8, expected one of float32, float16, bfloat16",
    ),
    "doubles": (lambda t: t.update({NORM: t[NORM].double()}), r"'model\.norm\.weight' is float64, expected one of"),
    "float8": (
        lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}),
        r"up_proj\.weight' is float8_e4m3fn, expected one of float32",
    ),
    "sparse": (lambda t: t.update({UP: t[UP].to_sparse()}), r"up_proj\.weight' is sparse_coo, expected a dense tensor"),
    "quantised": (lambda t: t.update({UP: quantised(t[UP])}), r"up_proj\.weight' is qint8, expected one of float32"),
    "without data": (
        lambda t: t.update({UP: t[UP].to("meta")}),
        r"up_proj\.weight' is without data, expected a dense tensor",
    ),
    "nan": (lambda t: t[UP].__setitem__((3, 4), float("nan")), r"up_proj\.weight' holds NaN or infinite values"),
    "infinite": (lambda t: t[UP].__setitem__((-1, -1), -float("inf")), r"up_proj\.weight' holds NaN or infinite"),
    "missing": (lambda t: t.pop(UP), r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape .* is missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_other_than_plain_weights_are_refused(folder: Path, change: str) -> None:
    rewrite(folder, CHANGES[change][0])
    assert_refused(folder, CHANGES[change][1])


def assert_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_code_in_a_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({NORM: Code(tmp_path / "ran")}))
    assert_refused(folder, r"pytorch_model\.bin: holds more than tensors \(.*eval\) and is not loaded; .* safetensors")
    plain_pickle = pickle.dumps({NORM: Code(tmp_path / "ran")}, protocol=2)
    (folder / TORCH_SINGLE).write_bytes(plain_pickle)
    assert_refused(folder, r"pytorch_model\.bin: (holds more than tensors|not a whole PyTorch file)")
    torch.save(torch.nn.Linear(2, 2), folder / TORCH_SINGLE)
    assert_refused(folder, r"pytorch_model\.bin: holds more than tensors \(torch\.nn.*Linear\) and is not loaded")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pytorch_files_are_refused(folder: Path, zipped: bool) -> None:
    rewrite(folder, lambda tensors: None, _use_new_zipfile_serialization=zipped)
    data = (folder / TORCH_SINGLE).read_bytes()
    for size in (0, 3, 4, 30, len(data) // 2, len(data) - 1):
        (folder / TORCH_SINGLE).write_bytes(data[:size])
        if zipped or size < len(data) - 1:
            assert_refused(folder, r"pytorch_model\.bin: not a whole PyTorch file of tensors.*is the download complete")
    torch.save([torch.ones(3)], folder / TORCH_SINGLE)
    assert_refused(folder, r"pytorch_model\.bin: expected a dictionary of tensors, found list")


def test_message_names_the_pip_extra_where_pytorch_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r'only PyTorch reads this file; pip install "minillm-jax\[torch\]"'):
        open_folder(folder)


@BOTH_FORMATS
class TestShards:
    def test_tensor_in_two_files_is_refused(self, folder: Path, save: Any, single: str, index: str) -> None:
        tensors = torch.load(folder / TORCH_SINGLE, weights_only=True)
        weight_map = split(folder, save, single, index)
        other = next(name for name in weight_map.values() if name != weight_map[NORM])
        names = [name for name, file in weight_map.items() if file == other]
        save({name: tensors[name] for name in [*names, NORM]}, folder / other)
        assert_refused(
            folder, rf"{index}: tensor 'model\.norm\.weight' is in '.*-00001.*' and in '.*-00002.*'; remove it"
        )

    def test_one_file_under_two_names_is_refused(self, folder: Path, save: Any, single: str, index: str) -> None:
        weight_map = split(folder, save, single, index)
        (folder / "again.bin").symlink_to(weight_map[NORM])
        (folder / index).write_text(json.dumps({"weight_map": weight_map | {NORM: "again.bin"}}))
        assert_refused(folder, r"tensor '.*' is in 'again\.bin' and in '.*-0000")

    @pytest.mark.parametrize("name", ["../../file", "./model.bin", "/etc/passwd", "..", "", "a\0b"])
    def test_shard_names_outside_the_folder_are_refused(
        self, folder: Path, save: Any, single: str, index: str, name: str
    ) -> None:
        weight_map = split(folder, save, single, index)
        (folder / index).write_text(json.dumps({"weight_map": weight_map | {NORM: name}}))
        assert_refused(folder, rf"{index}: shard .* is not a plain file name in the same folder; not followed")

    def test_missing_or_empty_shards_are_refused(self, folder: Path, save: Any, single: str, index: str) -> None:
        shard = split(folder, save, single, index)[NORM]
        (folder / shard).write_bytes(b"")
        assert_refused(folder, rf"{shard}: not a whole (safetensors|PyTorch) file")
        (folder / shard).unlink()
        assert_refused(folder, rf"{shard}: the file is missing; is the download complete\?")
        (folder / shard).mkdir()
        assert_refused(folder, rf"{shard}: cannot be read \(Is a directory\)")

    def test_index_that_contradicts_the_shards_is_refused(
        self, folder: Path, save: Any, single: str, index: str
    ) -> None:
        weight_map = split(folder, save, single, index)
        (folder / index).write_text(json.dumps({"weight_map": weight_map | {"other": weight_map[NORM]}}))
        assert_refused(folder, r"the index places tensor 'other' in '.*', but the file does not hold it")
        weight_map.pop(NORM)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(folder, r"tensor 'model\.norm\.weight' of '.*' is not listed in the index")
        (folder / index).write_text("[]")
        assert_refused(folder, r"expected a JSON object, found list")


def test_float8_safetensors_are_refused(folder: Path) -> None:
    tensors = torch.load(folder / TORCH_SINGLE, weights_only=True)
    save_file(tensors | {UP: tensors[UP].to(torch.float8_e4m3fn)}, folder / SINGLE)
    assert_refused(folder, r"up_proj\.weight' is F8_E4M3, expected one of F32, F16, BF16; save the model")


def test_safetensors_file_truncated_after_opening_is_refused(dense: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "model"))
    source = open_folder(copy)
    with (copy / SINGLE).open("r+b") as file:
        file.truncate(8000)
    with pytest.raises(InputError, match=r"'lm_head\.weight' cannot be read \(the file has become shorter"):
        source.read("lm_head.weight", memory.aligned_empty)


# --------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("safe", [True, False])
def test_pytorch_files_are_downloaded_only_without_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    remote = ["config.json", "pytorch_model-00001-of-00001.bin", TORCH_INDEX, "training_args.bin"]
    remote += ["model-00001-of-00001.safetensors", INDEX] if safe else []

    def snapshot_download(name: str, revision: str | None, **patterns: list[str]) -> str:
        for file in huggingface_hub.utils.filter_repo_objects(remote, **patterns):
            (tmp_path / file).write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert locate("owner/name") == (tmp_path, None)
    fetched = {file.name for file in tmp_path.iterdir()}
    assert fetched == {"config.json", *(remote[4:] if safe else remote[1:3])}


# -------------------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_layouts_are_copied_exactly(dtype: type) -> None:
    """Every order of the axes, in three threads where an array has at least two kilobytes."""
    numbers = np.random.default_rng(0)
    for shape in [(), (7,), (1, 5), (300, 700), (3, 5, 7), (40, 64, 300), (2, 1, 600), (0, 4), (33, 3, 9, 65)]:
        for order in itertools.permutations(range(len(shape))):
            stored = numbers.standard_normal([shape[axis] for axis in order]).astype(dtype)
            source = stored.transpose(np.argsort(order))
            for target in (memory.aligned_empty(shape, np.dtype(dtype)), np.zeros((*shape, 2), np.float32)[..., 1]):
                memory.copy_layout(target, source, max_threads=3, bytes_per_thread=1 << 10)
                np.testing.assert_array_equal(target, source.astype(target.dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_check_finite_finds_every_nan_and_infinite_value(dtype: type) -> None:
    """Bit patterns around both infinities: the largest finite values, the infinities, the first and last NaN."""
    infinity = int(memory.as_integers(np.asarray(np.inf, dtype)))
    sign = 1 << (8 * np.dtype(dtype).itemsize - 1)
    for bits in (infinity - 1, infinity, infinity + 1, sign - 1, 0, sign):
        for pattern in (bits, (bits + sign) % (2 * sign)):
            finite = bits < infinity or bits == sign
            values = np.ones((3, 100), dtype)
            memory.as_integers(values)[1, 50] = pattern
            with nullcontext() if finite else pytest.raises(InputError, match="'tensor' holds NaN or infinite"):
                memory.check_finite(values, "tensor", "file")


def test_arrays_on_the_cpu_alias_the_memory_they_were_read_into(folder: Path) -> None:
    """Reading copies no array; writing copies no tensor that has the same layout in both formats."""
    addresses = set()

    def allocate(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        array = memory.aligned_empty(shape, dtype)
        addresses.add(array.ctypes.data)
        return array

    abstract = build(*parse(json.loads((folder / "config.json").read_text()), "config.json"))
    decoder = rules.fill(abstract, open_folder(folder), allocate=allocate)
    pointers = {path: leaf.unsafe_buffer_pointer() for path, leaf in named_arrays(decoder)}
    assert set(pointers.values()) <= addresses
    name, embedding = next(rules.tensors(decoder, {"model.embed_tokens.weight"}))
    assert (name, embedding.ctypes.data) == ("model.embed_tokens.weight", pointers["embedding"])
    assert jax.devices()[0].platform == "cpu"
