"""Number and length of the calibration windows: by the model, by the user, and by the text where it is short."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import calibrate, describe, load, prune
from minillm_jax.data.calibration_size import FACTOR, FEW_TOKENS_PER_CHANNEL, Size, few_tokens, fitted, size_for
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.loaded import Model
from tests.helpers import SMALL, hugging_face_folder, random_tokens, shared


@pytest.mark.parametrize(
    ("width", "positions", "samples", "length"),
    [
        (256, 512, 64, 128),  # the demo model
        (172, 512, 64, 128),  # stories260K
        (512, None, 64, 128),
        (1536, 8192, FACTOR * 12, 128),  # SmolLM2-135M
        (4096, 2048, FACTOR * 8, 512),
        (11008, 4096, FACTOR * 11008 / 2048, 2048),  # LLaMA-7B
        (11008, 1024, FACTOR * 11008 / 1024, 1024),
        (40, 16, 512, 16),
    ],
)
def test_the_size_follows_the_width(width: int, positions: int | None, samples: float, length: int) -> None:
    size = size_for(width, positions)
    assert (size.samples, size.length) == (int(np.ceil(samples)), length)
    assert size.samples * size.length >= max(8192, FACTOR * width)
    assert size.fewer
    assert size.shorter


def test_a_number_of_the_user_is_kept_and_the_other_follows() -> None:
    assert size_for(256, 512, length=32) == Size(256, 32, 8192, fewer=True, shorter=False)
    assert size_for(256, 512, samples=7) == Size(7, 128, 8192, fewer=False, shorter=True)
    assert size_for(256, 16, 7, 64) == Size(7, 64, 8192)


@pytest.mark.parametrize(
    ("samples", "length", "text", "expected"),
    [
        (None, None, 10**6, (86, 2048)),
        (None, None, 33_000, (16, 2048)),  # every window of the text
        (None, None, 20_000, (19, 1024)),
        (None, None, 3000, (23, 128)),
        (None, None, 100, (1, 128)),  # less than a window, which is an error later
        (None, 2048, 20_000, (9, 2048)),
        (20, None, 20_000, (20, 512)),
        (20, 2048, 20_000, (20, 2048)),  # more than the text has, which is an error later
    ],
)
def test_a_short_text_gives_shorter_and_fewer_windows(
    samples: int | None, length: int | None, text: int, expected: tuple[int, int]
) -> None:
    size = fitted(size_for(11_008, None, samples, length), lambda long: text // long)
    assert (size.samples, size.length) == expected


@pytest.fixture(scope="module")
def model() -> Model:
    return load(demo.FOLDER)


def test_calibrate_gives_small_models_64_windows_of_128_tokens(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(demo.training_text()[:80_000])
    drawn = calibrate(model, tmp_path / "text.txt")
    assert drawn.batches.windows.shape == (64, 128)
    assert drawn.fingerprint() == calibrate(model, tmp_path / "text.txt", 64, 128).fingerprint()


def test_stories260k_too() -> None:
    drawn = calibrate(
        describe(shared("models/stories260K")), shared("data/tinystories/tinystories_sample_2MiB.txt"), bos="no"
    )
    assert drawn.batches.windows.shape == (64, 128)


def test_a_wide_model_gets_more_and_longer_windows(tmp_path: Path) -> None:
    import transformers

    config = SMALL["llama"] | {"intermediate_size": 4096, "max_position_embeddings": 300}
    transformers.AutoConfig.for_model("llama", **config).save_pretrained(tmp_path)
    wide = describe(tmp_path)
    ids = random_tokens(97, 100_000)
    assert calibrate(wide, ids).batches.windows.shape == (219, 300)
    assert calibrate(wide, ids[:1000]).batches.windows.shape == (6, 150)
    assert calibrate(wide, ids, length=64).batches.windows.shape == (1024, 64)
    assert calibrate(wide, ids, samples=5).batches.windows.shape == (5, 300)
    with pytest.raises(InputError, match="1000 tokens make 15 windows of 64, but 20 are asked for"):
        calibrate(wide, ids[:1000], 20, 64)
    with pytest.raises(InputError, match="100 tokens are less than one window of 150"):
        calibrate(wide, ids[:100])


# ------------------------------------------------------------------------------------------------------ few tokens


def test_few_tokens_for_a_channel_are_a_sentence_with_what_helps() -> None:
    assert few_tokens(64, 128, FEW_TOKENS_PER_CHANNEL) == ""
    sentence = few_tokens(10, 128, 0.3125)  # 4096 channels
    assert sentence.startswith("0.31 calibration tokens for each MLP channel are few: below 2 the ridge decides")
    assert f"use --samples {FACTOR * 4096 // 128}, and a longer text" in sentence


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"samples": 3}, True),
        ({"samples": 4}, False),
        ({"samples": 3, "criterion": "wanda"}, True),
        ({"samples": 3, "refit": "none"}, True),
        ({"samples": 3, "criterion": "wanda", "refit": "none"}, False),
        ({"samples": 3, "structures": "layers"}, False),
    ],
    ids=str,
)
def test_only_a_run_that_solves_systems_warns(tmp_path: Path, options: dict[str, Any], warns: bool) -> None:
    model = load(hugging_face_folder(tmp_path / "model"))  # 40 channels
    given = {"ratio": 0.4, "seq_len": 20, **options}
    with warnings.catch_warnings(record=True, action="always", category=InputWarning) as found:
        pruned = prune(model, random_tokens(97, 600), **given)
    assert any("calibration tokens for each MLP channel are few" in str(one.message) for one in found) == warns
    assert (pruned.record or {})["tokens_per_channel"] == given["samples"] * 20 / 40
    assert (pruned.record or {})["budget"]["window"] == 20
