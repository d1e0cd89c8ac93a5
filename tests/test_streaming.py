"""Models whose layers are read one at a time: the same weights and figures as in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_jax.model.streamed import StreamedDecoder
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Job, Result, run
from minillm_jax.settings import Data, Evaluation
from tests.test_resuming import make_model


def prune(root: Path, output: str, **options: Any) -> Result:
    text = str(root / "tokens.npy")
    base = Recipe(data=Data(text, 6, 24), evaluation=Evaluation(text, 24, 0))
    recipe, given = recipes.with_options(base, {"ratio": 0.5} | options)
    return run(Job(str(root / "model"), str(root / output), recipe, given))


CASES = [
    ("llama", {}),
    ("opt", {"criterion": "flap", "refit": "bias"}),
    ("llama", {"criterion": "flap", "refit": "bias"}),
    ("bloom", {"allocation": "equal", "format": "padded"}),
    ("gemma2", {"criterion": "wanda", "refit": "none", "heads": "query"}),
    ("llama", {"criterion": "magnitude", "rounds": 2, "format": "gguf", "refit": "none"}),
    ("llama", {"structures": ("attention", "channels"), "allocation": "curves", "max_shard_size": "20KB"}),
    ("gpt_neox", {"criterion": "random"}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_streamed_pruning_writes_the_weights_of_a_pruning_in_memory(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    root = make_model(tmp_path, family)
    in_memory, streamed = (prune(root, name, **options, stream=name == "streamed") for name in ("memory", "streamed"))
    assert isinstance(streamed.pruned.decoder, StreamedDecoder)
    assert not (root / "streamed.checkpoint").exists()
    for before, after in ((in_memory.before, streamed.before), (in_memory.after, streamed.after)):
        assert before is not None
        assert after is not None
        assert after.loss == pytest.approx(before.loss, rel=1e-6)
    weights = sorted(path.name for path in (root / "memory").glob("model*"))
    assert weights == sorted(path.name for path in (root / "streamed").glob("model*"))
    for name in weights:
        assert (root / "memory" / name).read_bytes() == (root / "streamed" / name).read_bytes()
    assert in_memory.errors is not None
    assert streamed.errors is not None
    np.testing.assert_allclose(streamed.errors.stream, in_memory.errors.stream, rtol=1e-5)
