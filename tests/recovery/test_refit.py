"""Recovery in closed form: the walk from a pruned model to the stream of its teacher."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jax import numpy as jnp

import minillm_jax as mj
from convert.reader import read_model
from minillm_jax import api
from minillm_jax.data.batches import Batches
from minillm_jax.data.examples import Examples, whole_windows
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.tree import hidden_size, kernels, layer_count, named_arrays
from minillm_jax.pruning.slicing import slice_groups, slice_layers
from minillm_jax.recipes import used_recovery
from minillm_jax.recipes.recipe import load_as, with_options
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovery.recover import Recovered, Texts, recover_decoder
from minillm_jax.recovery.refit import refit_towards
from minillm_jax.recovery.settings import ClosedForm, Distillation, Sections, Training
from minillm_jax.recovery.teacher import in_memory
from minillm_jax.settings import Refit
from tests.helpers import arrays_equal, hugging_face_folder

WINDOWS = np.random.default_rng(0).integers(1, 97, (96, 12)).astype(np.int32)
REFIT = Sections(Training("refit"), refit=ClosedForm(alpha=1.0))


def text(windows: np.ndarray = WINDOWS) -> Examples:
    return whole_windows(windows, "random")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("model") / "model")).decoder


@pytest.fixture(scope="module")
def pruned(dense: Decoder) -> Decoder:
    """Half of the channels of every layer, without any refit."""
    width = dense.runs[0].mlp.down.kernel.shape[1]
    return slice_groups(dense, {"channel": [np.arange(width // 2)] * layer_count(dense)})


def distance(decoder: Decoder, dense: Decoder, windows: np.ndarray) -> float:
    """Relative error of the last residual stream."""
    found, expected = (final_hidden(one, jnp.asarray(windows)) for one in (decoder, dense))
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def recovered(
    decoder: Decoder, dense: Decoder | None, sections: Sections = REFIT, data: Examples | None = None
) -> Recovered:
    texts = Texts(data or text(WINDOWS[:64]), text(WINDOWS[64:]))
    return recover_decoder(decoder, texts, sections, 0, None if dense is None else in_memory(dense))


def test_the_refit_brings_other_text_nearer_to_the_dense_stream(pruned: Decoder, dense: Decoder) -> None:
    after = refit_towards(pruned, dense, Batches(WINDOWS[:64]), Refit(alpha=1.0))
    before = distance(pruned, dense, WINDOWS[64:])
    assert distance(after, dense, WINDOWS[64:]) < 0.95 * before
    assert {path: array.shape for path, array in named_arrays(after)} == {
        path: array.shape for path, array in named_arrays(pruned)
    }


def test_the_dense_model_has_nothing_to_gain(dense: Decoder) -> None:
    after = refit_towards(dense, dense, Batches(WINDOWS[:64]), Refit(alpha=1.0))
    assert distance(after, dense, WINDOWS) < 1e-5


def test_layers_of_unequal_width_and_without_groups(dense: Decoder) -> None:
    width = dense.runs[0].mlp.down.kernel.shape[1]
    channels = [np.arange(width // (2 + layer)) for layer in range(layer_count(dense))]
    heads = [np.arange(0 if layer == 0 else 1) for layer in range(layer_count(dense))]
    smaller = slice_groups(dense, {"channel": channels, "head": heads})
    after = refit_towards(smaller, dense, Batches(WINDOWS[:64]), Refit(alpha=1.0))
    assert distance(after, dense, WINDOWS[64:]) < distance(smaller, dense, WINDOWS[64:])


def test_a_recovery_by_refit_measures_both_models(pruned: Decoder, dense: Decoder) -> None:
    found = recovered(pruned, dense)
    first, last = found.outcome.points
    assert (first.update, last.update, found.adapter, found.outcome.tokens) == (0, 1, None, 64 * 11)
    assert None not in (first.validation, last.validation)
    assert found.trained_parameters == sum(kernel.size for run in pruned.runs for kernel in kernels(run).values())
    assert arrays_equal(found.decoder, recovered(pruned, dense).decoder)


def test_updates_times_batch_sequences_are_read(pruned: Decoder, dense: Decoder) -> None:
    few = replace(REFIT, training=Training("refit", steps=2, batch=16))
    assert recovered(pruned, dense, few).outcome.tokens == 32 * 11


def test_what_a_refit_cannot_use_is_one_sentence(pruned: Decoder, dense: Decoder) -> None:
    with pytest.raises(InputError, match="fits the layers to those of a teacher; name the dense model with --teacher"):
        recovered(pruned, None)
    shorter = slice_layers(dense, [0])
    with pytest.raises(InputError, match=f"the pruned model has 1 layers, the teacher {layer_count(dense)}; use"):
        recovered(shorter, dense)
    padded = text(WINDOWS[:64])
    padded.counted[3, 8:] = False
    with pytest.raises(InputError, match=r"random: --method refit reads whole sequences, .* use --packing packed"):
        recovered(pruned, dense, data=padded)
    assert hidden_size(pruned) == hidden_size(dense)
    tokens_alone = replace(REFIT, distillation=Distillation("dense", teacher_logits="folder"))
    with pytest.raises(InputError, match="reads the layers of the teacher; leave --teacher-logits out"):
        recovered(pruned, dense, tokens_alone)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"learning_rate": 1e-3}, "method refit makes no updates"),
        ({"kd_weight": "0.5:0.5"}, "method refit makes no updates"),
        ({"rank": 4}, "method refit trains no adapter"),
    ],
)
def test_settings_of_updates_are_refused(option: dict[str, object], why: str) -> None:
    settings, flags = with_options(load_as(Recovery, "distil"), {"method": "refit", "teacher": "dense"} | option)
    with pytest.raises(InputError, match=why):
        used_recovery.check(settings, flags)
    other, flags = with_options(load_as(Recovery, "distil"), {"refit_alpha": 1.0})
    with pytest.raises(InputError, match=r"--refit-alpha would do nothing in this run \(method lora\)"):
        used_recovery.check(other, flags)


def test_the_public_function_refits_a_model_of_any_widths(tmp_path: Path) -> None:
    model = api.load(hugging_face_folder(tmp_path / "model"))
    smaller = api.prune(model, WINDOWS, 0.5, criterion="magnitude", refit="none")
    better = mj.recover(smaller, WINDOWS, teacher=model, method="refit", seq_len=12, held_out=8)
    assert better.record is not None
    assert better.record["recovery"]["updates"] == 1
    assert better.record["recovery"]["settings"]["training"]["method"] == "refit"


def test_experts_are_refitted_too(tmp_path: Path) -> None:
    """A mixture that has lost two experts of each layer, and has a shared expert."""
    shape = {"num_hidden_layers": 2, "mlp_only_layers": []}
    dense = read_model(hugging_face_folder(tmp_path / "model", "qwen2_moe", **shape)).decoder
    pruned = slice_groups(dense, {"expert": [np.arange(4)] * layer_count(dense)})
    after = refit_towards(pruned, dense, Batches(WINDOWS[:64]), Refit(alpha=1.0))
    assert distance(after, dense, WINDOWS[64:]) < 0.95 * distance(pruned, dense, WINDOWS[64:])
    before = dict(named_arrays(pruned))
    changed = {path for path, array in named_arrays(after) if not np.array_equal(array, before[path])}
    assert {"runs.0.experts.down", "runs.0.mlp.down.kernel", "runs.0.attention.o.kernel"} <= changed
    assert not {path for path in changed if path.startswith("runs.0.experts.") and path != "runs.0.experts.down"}
    # The experts alone: the others have no groups to refit.
    alone = slice_groups(pruned, {kind: [np.arange(0)] * layer_count(dense) for kind in ("head", "channel")})
    whole = slice_groups(dense, {kind: [np.arange(0)] * layer_count(dense) for kind in ("head", "channel")})
    after = refit_towards(alone, whole, Batches(WINDOWS[:64]), Refit(alpha=1.0))
    assert distance(after, whole, WINDOWS[64:]) < 0.95 * distance(alone, whole, WINDOWS[64:])
