"""Trained models, pruned from folder to folder and loaded in both frameworks; needs `shared` beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minillm_jax.api import load
from minillm_jax.data.batches import Batches
from minillm_jax.data.text import read_tokens
from minillm_jax.data.windows import cut
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Job, run
from minillm_jax.settings import Budget, Data, Output, Refit, Scoring
from tests.helpers import load_stock, load_torch, shared, torch_logits

TEXT = "data/tinystories/tinystories_sample_2MiB.txt"


def torch_perplexity(model: torch.nn.Module, windows: np.ndarray) -> float:
    """Perplexity over windows by PyTorch: exp of the mean negative log likelihood of a token."""
    logits = torch.from_numpy(torch_logits(model, windows)).double()
    targets = torch.from_numpy(windows.astype(np.int64))[:, 1:]
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, targets[..., None])
    return float(torch.exp(-chosen.mean()))


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("name", ["opt-3m", "bloom-3m"])
def test_pruned_models_have_the_same_perplexity_in_both_frameworks(
    name: str, ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers of unequal size, loaded by remote code and by registered classes, and padded with zeros."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, text = shared(f"models/{name}"), tmp_path / "text.txt"
    text.write_text(shared(TEXT).read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    windows = Batches(cut(read_tokens(text, folder, 2048), 128)[:32])
    perplexities = {}
    for form in (None, "padded"):
        output = tmp_path / str(form)
        recipe = Recipe(
            data=Data(str(text), samples=10),
            budget=Budget(ratio),
            scoring=Scoring("wanda"),
            refit=Refit("none"),
            output=Output(form),
        )
        assert run(Job(str(folder), str(output), recipe)).written.format == (form or "per-layer")
        perplexities[f"jax {form}"] = perplexity(load(output).decoder, windows).perplexity
    loaded = {
        "remote code": load_torch(tmp_path / "None", remote_code=True),
        "package": load_torch(tmp_path / "None"),
        "padded": load_stock(tmp_path / "padded"),
    }
    perplexities |= {how: torch_perplexity(model, windows.windows) for how, model in loaded.items()}
    reference = perplexities["jax None"]
    dense = perplexity(load(folder).decoder, windows).perplexity
    assert dense < reference < 2048
    for how, value in perplexities.items():
        assert abs(value - reference) <= 1e-3 * reference, (how, perplexities)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "None")
    prompt = tokenizer("One day", return_tensors="pt", return_token_type_ids=False)
    assert loaded["remote code"].generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 5
