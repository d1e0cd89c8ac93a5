"""Real, trained models pruned from folder to folder, in both frameworks; need `shared` beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minillm_jax.api import load
from minillm_jax.budget.budget import Budget
from minillm_jax.model import loss
from minillm_jax.run import Job, run
from minillm_jax.scoring.score import Scoring
from tests.helpers import load_stock, load_torch, shared, torch_logits

TEXT = "data/tinystories/tinystories_sample_2MiB.txt"


def torch_perplexity(model: torch.nn.Module, windows: np.ndarray) -> float:
    """exp(total negative log likelihood / predictions), by PyTorch."""
    logits = torch.from_numpy(torch_logits(model, windows)).double()
    targets = torch.from_numpy(windows.astype(np.int64))[:, 1:]
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, targets[..., None])
    return float(torch.exp(-chosen.mean()))


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("name", ["opt-3m", "bloom-3m"])
def test_pruned_and_loaded_in_both_frameworks(
    name: str, ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity is the same in both, with remote code, without, and zero-padded."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, text = shared(f"models/{name}"), shared(TEXT)
    start = text.read_text(encoding="utf-8")[:60_000]
    (tmp_path / "text.txt").write_text(start, encoding="utf-8")
    windows = text.cut(text.read_tokens(tmp_path / "text.txt", folder, 2048), 128)[:32]
    perplexities = {}
    for form in (None, "padded"):
        output = tmp_path / str(form)
        job = Job(
            str(folder), str(tmp_path / "text.txt"), str(output), Budget(ratio), scoring=Scoring("wanda"), format=form
        )
        assert run(job).written.format == (form or "per-layer")
        perplexities[f"jax {form}"] = loss.perplexity(load(output).decoder, windows).perplexity
    loaded = {
        "remote code": load_torch(tmp_path / "None", remote_code=True),
        "package": load_torch(tmp_path / "None"),
        "padded": load_stock(tmp_path / "padded"),
    }
    perplexities |= {how: torch_perplexity(model, windows) for how, model in loaded.items()}
    reference = perplexities["jax None"]
    dense = loss.perplexity(load(folder).decoder, windows).perplexity
    assert dense < reference < 2048
    for how, found in perplexities.items():
        assert abs(found - reference) <= 1e-3 * reference, (how, perplexities)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "None")
    prompt = tokenizer("One day", return_tensors="pt", return_token_type_ids=False)
    assert loaded["remote code"].generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > 5
