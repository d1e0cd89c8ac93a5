"""What refit is worth on a trained model, which needs `shared` beside the checkout; and where it is computed."""

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import load
from minillm_jax.budget.budget import kept_count
from minillm_jax.data import text
from minillm_jax.model import axis_table, loss
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning import solve
from minillm_jax.pruning.refit import Refit, prune_by_obs, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.score import Scoring, score
from tests.helpers import best_of, shared

# Ratio -> the most that structured OBS may cost, as a multiple of the dense model's perplexity.
BOUNDS = {0.2: 1.60, 0.5: 4.45}


def test_refit_of_a_trained_model() -> None:
    """64 windows calibrate, 96 others are measured: least squares takes back more than half of what pruning cost."""
    folder, text = shared("models/stories260K"), shared("data/tinystories/tinystories_sample_2MiB.txt")
    model = load(folder)
    windows = text.sample(text.read_tokens(text, folder, 512), 160, 128, seed=0)
    calibrate, held_out = windows[:64], windows[64:]
    dense = loss.perplexity(model.decoder, held_out).perplexity
    scores = score(model, text.Calibration(calibrate, "stories", 0), Scoring("wanda"))
    for ratio, bound in BOUNDS.items():
        kept = best_of(scores.groups, ratio)
        counts = {kind: [kept_count(n, ratio) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
        found = {
            "wanda": slice_groups(model.decoder, kept),
            "least squares": slice_and_refit(model.decoder, kept, calibrate),
            "obs": prune_by_obs(model.decoder, counts, calibrate)[0],
        }
        ratios = {how: loss.perplexity(pruned, held_out).perplexity / dense for how, pruned in found.items()}
        assert ratios["least squares"] - 1 < (ratios["wanda"] - 1) / 2, ratios
        assert ratios["obs"] < min(bound, ratios["least squares"]), ratios


def test_a_trained_model_is_pruned_alike_on_host_and_device() -> None:
    """The same groups in float32 as in float64, and the same perplexity."""
    model = load(demo.FOLDER)
    tokens = text.tokenise(demo.held_out_text(), model.folder)
    windows = text.sample(text.Tokens(tokens, "held out", 1), 24, 128, seed=0)
    counts = {kind: [n // 2 for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
    host, device = (prune_by_obs(model.decoder, counts, windows[:8], Refit(solver=s)) for s in solve.SOLVERS)
    for kind in axis_table.KINDS:
        for ours, theirs in zip(host[1][kind], device[1][kind], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    found, other = (loss.perplexity(decoder, windows[8:]).perplexity for decoder, _ in (host, device))
    assert found == pytest.approx(other, rel=1e-5)
