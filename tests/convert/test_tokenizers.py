"""The tokenizer of a written folder gives the ids of the folder that was read, by this package and by transformers."""

import base64
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.data.text import tokenise
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.loaded import Model
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import SMALL, edit_json, hugging_face_folder, load_torch, quickly

TRAINING_TEXT = [
    "Once upon a time there was a little dog. It didn't like the rain, but it liked to run and play.",
    "def f(x):\n    return x**2  # 1234567890",
    "The dog saw a big red ball, and it said: “Let's play!” They played until the end of the day.",
    "naïve café, 中文 and 日本語; <html>&amp;</html>",
] * 5
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

TEXTS = (
    "Hello dog",
    " leading",
    "  two  spaces",
    "\n\nlines\n",
    "a</s> b <s>c",
    "naïve 中文 🙂 cafe\u0301",
    "1234567890",
    "def f(x):\n    return x**2",
    "it's we'll",
    "",
)


# ------------------------------------------------------------------------------------------ tiny real tokenizers


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3: byte pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def old_llama() -> Tokenizer:
    """As in the tokenizer.json of the first Llama models: spaces are replaced before tokens are split off."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIAL.values()), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def json_file(make: Callable[[], Tokenizer], **config: Any) -> Callable[[Path], None]:
    """Writes tokenizer.json, and tokenizer_config.json if it has keys."""

    def write(folder: Path) -> None:
        make().save(str(folder / "tokenizer.json"))
        if config:
            write_json(folder / "tokenizer_config.json", config)

    return write


def vocabulary(maps: bool = False, **config: Any) -> Callable[[Path], None]:
    """Writes vocab.json and merges.txt, tokenizer_config.json if it has keys, and the files of older versions."""

    def write(folder: Path) -> None:
        byte_level().model.save(str(folder))
        if config:
            write_json(folder / "tokenizer_config.json", config)
        if maps:
            write_json(folder / "special_tokens_map.json", SPECIAL)
            write_json(folder / "added_tokens.json", {"<extra>": 320})

    return write


def sentencepiece_file(**config: Any) -> Callable[[Path], None]:
    """Writes tokenizer.model, and tokenizer_config.json if it has keys; skips where sentencepiece is missing."""

    def write(folder: Path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TRAINING_TEXT),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
        (folder / "tokenizer.vocab").unlink()
        if config:
            write_json(folder / "tokenizer_config.json", config)

    return write


ADDED = {"320": {"content": "<|im_start|>", "special": True}}

# Kind of tokenizer files → writer of the files, for a folder of a Llama.
KINDS = {
    "byte level": json_file(byte_level),
    "byte level, class": json_file(byte_level, **SPECIAL, tokenizer_class="PreTrainedTokenizerFast"),
    "byte level, wrong class": json_file(byte_level, **SPECIAL, tokenizer_class="LlamaTokenizer"),
    "old Llama": json_file(old_llama, **SPECIAL),
    "old Llama, legacy": json_file(old_llama, **SPECIAL, tokenizer_class="LlamaTokenizer", legacy=True),
    "old Llama, not legacy": json_file(old_llama, **SPECIAL, tokenizer_class="LlamaTokenizerFast", legacy=False),
    "unigram": json_file(unigram, **SPECIAL),
    "words": json_file(words, **SPECIAL),
    "vocab.json": vocabulary(**SPECIAL, tokenizer_class="GPT2Tokenizer"),
    "vocab.json, old files": vocabulary(maps=True, tokenizer_class="GPT2TokenizerFast", add_prefix_space=True),
    "vocab.json, added tokens": vocabulary(**SPECIAL, tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=ADDED),
    "sentencepiece": sentencepiece_file(),
    "sentencepiece, class": sentencepiece_file(**SPECIAL, tokenizer_class="LlamaTokenizer", legacy=False),
    "sentencepiece, legacy": sentencepiece_file(tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True),
    "sentencepiece, pad token": sentencepiece_file(tokenizer_class="LlamaTokenizer", pad_token="<pad>"),
}


@pytest.fixture(autouse=True)
def _fresh_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as a user's process has it: other tests register the classes of `convert.modeling_pruned`."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A small dense model of a family, read once."""
    models_: dict[str, Model] = {}

    def read(family: str) -> Model:
        if family not in models_:
            folder = tmp_path_factory.mktemp(family)
            models_[family] = read_model(hugging_face_folder(folder, family, num_hidden_layers=2))
        return models_[family]

    return read


def with_tokenizer(model: Model, folder: Path, write: Callable[[Path], None], **changes: Any) -> Model:
    """The model as if it had been read from a folder with these tokenizer files."""
    folder.mkdir()
    model = replace(model, folder=folder, raw_config=model.raw_config | changes)
    write_json(folder / "config.json", model.raw_config)
    write(folder)
    return model


def with_three_heads(model: Model) -> Model:
    """Six query heads of a hidden size of 64, which Llama's class refuses, so that the model is written as Mistral."""
    kept = {"head": [np.arange(3)] * 2, "channel": [np.arange(40)] * 2}
    return replace(model, decoder=slice_groups(model.decoder, kept))


def behaviour(tokenizer: Any) -> list[Any]:
    """Ids with and without special tokens, decoded texts, and what a caller sees of the tokenizer."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    called = [dict(tokenizer(text)) for text in TEXTS]
    texts = [tokenizer.decode(ids) for ids in encoded]
    ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side]
    return [encoded, called, texts, ends, len(tokenizer), tokenizer.chat_template]


def our_ids(folder: Path) -> list[list[int]]:
    return [tokenise(text, folder).tolist() for text in TEXTS]


@contextmanager
def messages_of_transformers() -> Iterator[list[str]]:
    """The messages that transformers logs inside the block."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


# ---------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("family", quickly(SMALL))
def test_every_family_reads_its_tokenizer_in_every_format(
    dense: Callable[[str], Model], tmp_path: Path, family: str
) -> None:
    """By this package, and by transformers without remote code and with it; no warning escapes."""
    write = vocabulary(**SPECIAL) if family in ("opt", "qwen2", "qwen3") else KINDS["byte level, class"]
    model = with_tokenizer(dense(family), tmp_path / "source", write)
    expected = behaviour(AutoTokenizer.from_pretrained(tmp_path / "source"))
    for format_name in ("stock", "per-layer", "flax"):
        write_model(model, tmp_path / format_name, format_name)
        assert our_ids(tmp_path / format_name) == expected[0]
        assert behaviour(AutoTokenizer.from_pretrained(tmp_path / format_name, trust_remote_code=False)) == expected
        read_model(tmp_path / format_name)
    trusting = AutoTokenizer.from_pretrained(tmp_path / "per-layer", trust_remote_code=True)
    assert behaviour(trusting) == expected
    config = AutoConfig.from_pretrained(tmp_path / "per-layer", trust_remote_code=True)
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_files_keeps_its_ids(dense: Callable[[str], Model], tmp_path: Path, kind: str) -> None:
    """A Llama written as Mistral and with layers of unequal size: transformers chooses other classes for both."""
    model = with_tokenizer(dense("llama"), tmp_path / "source", KINDS[kind])
    expected = behaviour(AutoTokenizer.from_pretrained(tmp_path / "source"))
    write_model(with_three_heads(model), tmp_path / "mistral")
    assert json.loads((tmp_path / "mistral" / "config.json").read_text())["model_type"] == "mistral"
    write_model(model, tmp_path / "per-layer", "per-layer")
    for name in ("mistral", "per-layer"):
        assert our_ids(tmp_path / name) == expected[0]
        assert behaviour(AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=False)) == expected
        assert "source" not in (tmp_path / name / "tokenizer_config.json").read_text(), "no local path is written"


def test_a_written_tokenizer_survives_further_pruning(dense: Callable[[str], Model], tmp_path: Path) -> None:
    """From Llama to Mistral, to unequal layers, to Flax, and back to a stock class."""
    model = with_tokenizer(dense("llama"), tmp_path / "source", KINDS["old Llama, legacy"])
    expected = behaviour(AutoTokenizer.from_pretrained(tmp_path / "source"))
    model = with_three_heads(model)
    for number, format_name in enumerate(("stock", "per-layer", "flax", "stock")):
        folder = tmp_path / f"{number}"
        write_model(model, folder, format_name)
        assert our_ids(folder) == expected[0]
        assert behaviour(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)) == expected
        model = read_model(folder)


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_a_copy_saved_by_transformers_reads_its_tokenizer(
    dense: Callable[[str], Model], tmp_path: Path, family: str
) -> None:
    """As after training with LoRA: `save_pretrained` of the model and of its tokenizer."""
    model = with_tokenizer(dense(family), tmp_path / "source", KINDS["byte level, class"])
    write_model(model, tmp_path / "per-layer", "per-layer")
    load_torch(tmp_path / "per-layer").save_pretrained(tmp_path / "copy")
    CONFIG_MAPPING._extra_content.clear()
    AutoTokenizer.from_pretrained(tmp_path / "per-layer", trust_remote_code=False).save_pretrained(tmp_path / "copy")
    assert our_ids(tmp_path / "copy") == our_ids(tmp_path / "source")
    plain = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=False)
    assert [plain(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == our_ids(tmp_path / "source")


def test_a_folder_of_an_earlier_version_reads_its_tokenizer(dense: Callable[[str], Model], tmp_path: Path) -> None:
    """Earlier versions wrote neither the class of the tokenizer nor the usual name of the number of layers."""
    for family in ("opt", "bloom"):
        write = vocabulary(**SPECIAL) if family == "opt" else KINDS["byte level"]
        model = with_tokenizer(dense(family), tmp_path / family, write)
        write_model(model, tmp_path / f"{family}-out", "per-layer")
        edit_json(tmp_path / f"{family}-out" / "tokenizer_config.json", tokenizer_class=None)
        edit_json(tmp_path / f"{family}-out" / "config.json", num_hidden_layers=2 if family == "opt" else None)
        assert our_ids(tmp_path / f"{family}-out") == our_ids(tmp_path / family)


def test_a_tokenizer_behind_a_link_is_written_as_it_was_read(dense: Callable[[str], Model], tmp_path: Path) -> None:
    """The link leads out of the folder, so the file is not copied."""
    model = with_tokenizer(dense("llama"), tmp_path / "source", KINDS["byte level, class"])
    shutil.move(tmp_path / "source" / "tokenizer.json", tmp_path / "elsewhere.json")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.warns(InputWarning, match=r"tokenizer\.json \(a link to a file outside the model folder\)"):
        write_model(model, tmp_path / "out")
    assert our_ids(tmp_path / "out") == our_ids(tmp_path / "source")


def test_a_pipeline_runs_a_per_layer_folder(dense: Callable[[str], Model], tmp_path: Path) -> None:
    model = with_tokenizer(dense("bloom"), tmp_path / "source", json_file(words, **SPECIAL))
    write_model(model, tmp_path / "out", "per-layer")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert pipeline("The dog", max_new_tokens=1, do_sample=False)[0]["generated_text"].startswith("The dog")


def test_a_large_vocabulary_draws_no_warning_of_mistral(dense: Callable[[str], Model], tmp_path: Path) -> None:
    """transformers takes every large vocabulary of model type `mistral` for one with a wrong regular expression."""

    def write(folder: Path) -> None:
        vocabulary_ = {f"w{number}": number for number in range(100_002)} | {"<unk>": 100_002}
        tokenizer = Tokenizer(models.WordLevel(vocabulary_, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})

    model = with_tokenizer(dense("llama"), tmp_path / "source", write, transformers_version="4.43.0")
    write_model(with_three_heads(model), tmp_path / "out")
    with messages_of_transformers() as messages:
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w99999")["input_ids"] == [5, 99_999]
    assert messages == []


# ------------------------------------------------------------------------------------- tokenizers that differ


def test_weights_are_written_where_no_way_gives_the_same_ids(
    dense: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    model = with_tokenizer(dense("llama"), tmp_path / "source", KINDS["old Llama, legacy"])
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.warns(InputWarning, match=r"source: the tokenizer .* differs .*use the tokenizer of .*source with"):
        write_model(with_three_heads(model), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_tokenizer_with_code_is_copied_unchecked(dense: Callable[[str], Model], tmp_path: Path) -> None:
    code = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    model = with_tokenizer(dense("llama"), tmp_path / "source", json_file(byte_level, **code))
    (tmp_path / "source" / "tokenization_own.py").write_text("raise SystemExit")
    with pytest.warns(InputWarning, match="needs Python code .* never run; .* copied unchecked"):
        write_model(model, tmp_path / "out", "per-layer")
    assert (tmp_path / "out" / "tokenization_own.py").read_text() == "raise SystemExit"
    with pytest.raises(InputError, match=r"needs Python code of that folder, which is never run; give token ids as"):
        tokenise("a", tmp_path / "out")


# --------------------------------------------------------------------------------------- what an error advises


def llama_folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    write_json(path / "config.json", {"model_type": "llama"})
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("hidden", "content", "advice"),
    [
        ("sentencepiece", b"\n\x0e\n\x05<unk>", r"tokenizer\.model needs sentencepiece: pip install sentencepiece; or"),
        ("tiktoken", base64.b64encode(b"a") + b" 0\n", r"tokenizer\.model needs tiktoken: pip install tiktoken; or"),
        (None, b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer .*run git lfs pull"),
    ],
)
def test_an_unreadable_tokenizer_model_names_the_package_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str | None, content: bytes, advice: str
) -> None:
    if hidden is not None:
        monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(InputError, match=advice):
        tokenise("a", llama_folder(tmp_path / "model", tokenizer_model=content))


def test_a_damaged_tokenizer_model_is_said_to_be_damaged(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(InputError, match=r"not a whole sentencepiece model; is the download complete\?; or give"):
        tokenise("a", llama_folder(tmp_path / "model", tokenizer_model=b"\xff\xfe\xfd damaged"))


def test_vocabulary_files_without_a_class_get_advice_that_works(tmp_path: Path) -> None:
    """transformers itself advises to install sentencepiece or tiktoken, which read other files."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "llama"})
    vocabulary(**SPECIAL)(folder)
    with pytest.raises(InputError, match=r"GPT2Tokenizer\.from_pretrained\(folder\)\.save_pretrained\(folder\)") as e:
        tokenise("a", folder)
    assert "sentencepiece" not in str(e.value)
    transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    assert tokenise("a dog", folder).size > 0


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_folder_without_vocabulary_is_an_error(tmp_path: Path, family: str) -> None:
    """Some classes of transformers make an empty tokenizer, which gives no ids."""
    write_json(tmp_path / "config.json", {"model_type": family})
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(InputError, match=r"no usable tokenizer .*give token ids as \.npy instead"):
        tokenise("a", tmp_path)


def test_a_model_whose_folder_has_vanished_is_written(dense: Callable[[str], Model], tmp_path: Path) -> None:
    model = with_tokenizer(dense("llama"), tmp_path / "source", KINDS["byte level"])
    shutil.rmtree(tmp_path / "source")
    with pytest.warns(InputWarning, match="source: not copied beside the weights"):
        write_model(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
