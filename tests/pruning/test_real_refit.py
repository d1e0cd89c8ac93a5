"""The refit of trained models: the demo model, and a model that needs the folder `shared` beside the checkout."""

import numpy as np
import pytest

from minillm_jax import demo
from minillm_jax.api import load
from minillm_jax.budget.budget import kept_count
from minillm_jax.data import text, windows
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model import axis_table
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning.refit import prune_by_obs, slice_and_refit
from minillm_jax.pruning.slicing import slice_groups
from minillm_jax.scoring.score import score
from minillm_jax.settings import SOLVERS, Refit, Scoring
from tests.helpers import best_of, shared

# Ratio -> largest perplexity of the model pruned by structured OBS, as a multiple of the dense model's.
BOUNDS = {0.2: 1.60, 0.5: 4.45}


@pytest.mark.slow
def test_refit_recovers_more_than_half_of_the_loss_of_a_trained_model() -> None:
    """64 windows calibrate, 96 other windows measure the perplexity."""
    folder, source = shared("models/stories260K"), shared("data/tinystories/tinystories_sample_2MiB.txt")
    model = load(folder)
    sampled = windows.sample(text.read_tokens(source, folder, 512), 160, 128, seed=0)
    calibration, held_out = Batches(sampled[:64]), Batches(sampled[64:])
    dense = perplexity(model.decoder, held_out).perplexity
    scores = score(model, Calibration(calibration, "stories", 0), Scoring("wanda"))
    for ratio, bound in BOUNDS.items():
        kept = best_of(scores.groups, ratio)
        counts = {kind: [kept_count(n, ratio) for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
        decoders = {
            "wanda": slice_groups(model.decoder, kept),
            "least squares": slice_and_refit(model.decoder, kept, calibration),
            "obs": prune_by_obs(model.decoder, counts, calibration)[0],
        }
        ratios = {name: perplexity(pruned, held_out).perplexity / dense for name, pruned in decoders.items()}
        assert ratios["least squares"] - 1 < (ratios["wanda"] - 1) / 2, ratios
        assert ratios["obs"] < min(bound, ratios["least squares"]), ratios


@pytest.mark.slow
def test_host_and_device_prune_a_trained_model_alike() -> None:
    """Float32 on the device chooses the same groups as float64 on the host, and reaches the same perplexity."""
    model = load(demo.FOLDER)
    tokens = text.tokenise(demo.held_out_text(), model.folder)
    sampled = windows.sample(text.Tokens(tokens, "held out", 1), 24, 128, seed=0)
    calibration, held_out = Batches(sampled[:8]), Batches(sampled[8:])
    counts = {kind: [n // 2 for n in group_counts(model.decoder, kind)] for kind in axis_table.KINDS}
    (host, kept_on_host), (device, kept_on_device) = (
        prune_by_obs(model.decoder, counts, calibration, Refit(solver=solver)) for solver in SOLVERS
    )
    for kind in axis_table.KINDS:
        for rows_on_host, rows_on_device in zip(kept_on_host[kind], kept_on_device[kind], strict=True):
            np.testing.assert_array_equal(rows_on_host, rows_on_device)
    perplexities = [perplexity(decoder, held_out).perplexity for decoder in (host, device)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
