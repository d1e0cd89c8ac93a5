"""Zeros in the place of removed groups: every combination of structures, heads and families has a padded shape."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers

from convert import formats
from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.budget.budget import choose
from minillm_jax.errors import InputError
from minillm_jax.model import axis_table
from minillm_jax.model.build import build
from minillm_jax.model.config import DecoderConfig, Sizes
from minillm_jax.model.families import parse
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import group_counts, named_arrays, part_counts
from minillm_jax.pruning.padding import pad_groups
from minillm_jax.pruning.slicing import slice_groups, slice_sizes
from tests.helpers import SMALL, hugging_face_folder, load_stock, logits_of, quickly, random_tokens, torch_logits

TOKENS = random_tokens(97, 2, 20)
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}


def unequal(counts: dict[str, list[int]], parts: dict[str, list[int]]) -> axis_table.Kept:
    """Groups chosen at random, fewer in the later layers."""
    scores = {kind: [np.random.default_rng(n).random(n) for n in rows] for kind, rows in counts.items()}
    fewer = {
        kind: [max(part, n - layer * part) for layer, (n, part) in enumerate(zip(rows, parts[kind], strict=True))]
        for kind, rows in counts.items()
    }
    return choose(scores, fewer, parts)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("dense") / "model", **GROUPED))


@pytest.mark.parametrize("recorded", [False, True])
def test_unequal_query_heads_are_padded_with_equal_outputs(dense: Model, tmp_path: Path, recorded: bool) -> None:
    """Each layer keeps another number of query heads; with the pruning record they return to their places."""
    kinds = ("query", "channel")
    decoder = dense.decoder
    kept = unequal({kind: group_counts(decoder, kind) for kind in kinds}, part_counts(decoder, kinds))
    assert [len(rows) for rows in kept["query"]] == [8, 6, 4]
    record = {"kept": {kind: [np.asarray(row).tolist() for row in rows] for kind, rows in kept.items()}}
    pruned = dataclasses.replace(dense, decoder=slice_groups(decoder, kept), record=record if recorded else None)
    expected = logits_of(pruned.decoder, TOKENS)
    assert write_model(pruned, tmp_path / "out", "padded").format == "padded"
    padded = read_model(tmp_path / "out").decoder
    np.testing.assert_allclose(logits_of(padded, TOKENS), expected, atol=1e-5)
    np.testing.assert_allclose(torch_logits(load_stock(tmp_path / "out"), TOKENS), expected, atol=1e-4)
    kernel = np.asarray(padded.runs[0].attention.o.kernel[...])
    for layer, heads in enumerate(kept["query"]):
        filled = np.flatnonzero(kernel[layer].any((1, 2)))
        assert len(filled) == len(heads)
        assert not recorded or filled.tolist() == np.asarray(heads).tolist()


def test_stock_class_that_divides_the_hidden_size_gets_more_query_heads(tmp_path: Path) -> None:
    """A Llama with biases accepts divisors of the hidden size only: 2 x 3 query heads are padded to 2 x 4."""
    model = read_model(hugging_face_folder(tmp_path / "model", **GROUPED, attention_bias=True))
    three = [np.array([0, 1, 2, 4, 5, 6])] * 3
    pruned = dataclasses.replace(model, decoder=slice_groups(model.decoder, {"query": three}))
    write_model(pruned, tmp_path / "out", "padded")
    padded = read_model(tmp_path / "out").decoder
    assert (group_counts(padded, "query")[0], group_counts(padded, "head")[0]) == (8, 2)
    np.testing.assert_allclose(logits_of(padded, TOKENS), logits_of(pruned.decoder, TOKENS), atol=1e-5)


# No stock class of these families holds fewer channels, or another number of heads.
NO_STOCK = ("padding cannot fit this model into a stock class", "heads of zeros would change the norms")


HEADS, QUERIES, CHANNELS = ("head", "channel"), ("query", "channel"), (("channel",),)


def padded_shapes(config: DecoderConfig, smaller: Sizes, target: Sizes) -> dict[str, tuple[int, ...]]:
    places = {
        "head": [np.arange(layer.K) for layer in smaller.layers],
        "query": [np.arange(layer.N) % (layer.N // layer.K) for layer in smaller.layers],
        "channel": [np.arange(layer.F) for layer in smaller.layers],
    }
    padded = jax.eval_shape(lambda decoder: pad_groups(decoder, target, places), build(config, smaller))
    return {path: array.shape for path, array in named_arrays(padded)}


@pytest.mark.parametrize("family", quickly(SMALL))
def test_padding_has_the_described_shapes(family: str) -> None:
    """Heads or query heads with channels, and each after the other; or one sentence before any work."""
    raw = transformers.AutoConfig.for_model(family, **SMALL[family]).to_dict()
    config, sizes = parse(raw, "config.json")
    described = 0
    for steps in (CHANNELS, (HEADS,), (QUERIES,), (HEADS, QUERIES), (QUERIES, HEADS)):
        smaller = sizes
        for kinds in steps:
            abstract = build(config, smaller)
            counts = {kind: group_counts(abstract, kind) for kind in kinds}
            smaller = slice_sizes(smaller, unequal(counts, part_counts(abstract, kinds)))
        if formats_refuses(config, smaller, raw):
            continue
        target = formats.describe(config, smaller, raw, "padded").sizes
        expected = {path: array.shape for path, array in named_arrays(build(config, target))}
        assert padded_shapes(config, smaller, target) == expected
        described += 1
    assert described > 0


def formats_refuses(config: DecoderConfig, sizes: Sizes, raw: dict[str, Any]) -> bool:
    try:
        formats.describe(config, sizes, raw, "padded")
    except InputError as error:
        return str(error).startswith(NO_STOCK)
    return False
