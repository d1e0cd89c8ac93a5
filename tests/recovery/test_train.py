"""Training of a recovery: gradients and losses are those of PEFT, and an interrupted run continues bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from jax import numpy as jnp

from convert.adapter import write_adapter
from convert.reader import read_model
from minillm_jax.data.examples import Examples
from minillm_jax.devices.store import Store
from minillm_jax.errors import InputError
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import named_arrays
from minillm_jax.recovery import gradients, objective, teacher
from minillm_jax.recovery.adapter import Adapter, initial
from minillm_jax.recovery.gradients import Part
from minillm_jax.recovery.objective import Sequences, Weights
from minillm_jax.recovery.recover import Recovered, Texts, recover_decoder
from minillm_jax.recovery.rules import Mezo
from minillm_jax.recovery.settings import Distillation, ForwardOnly, Lora, Sections, Training
from minillm_jax.recovery.train import mean_loss, rows_of
from minillm_jax.recovery.trained import TrainedAdapter, TrainedArrays, TrainedMatrices
from minillm_jax.scoring.gradient import directions
from tests.helpers import arrays_equal, hugging_face_folder

# PEFT calls a method of transformers that is deprecated.
PEFT = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    # It looks for the names of parameters among those of modules.
    "ignore:The following (rank|alpha)_pattern keys did not match any targeted module:RuntimeWarning",
)
LORA = Lora(rank=4, alpha=8.0)
CE = Weights(0.0, 1.0)
TRAINING = Training(steps=6, batch=4, micro_batch=2, warmup=2, validate_every=2, learning_rate=1e-2)


def examples(count: int = 12, length: int = 10, seed: int = 0) -> Examples:
    """Random sequences of unequal lengths, whose first tokens do not count."""
    tokens = np.random.default_rng((seed, 1)).integers(1, 97, (count, length))
    lengths = np.random.default_rng(seed).integers(5, length + 1, count)[:, None]
    places = np.arange(length)[None, :]
    return Examples(
        np.where(places < lengths, tokens, 0).astype(np.int32), (places >= 3) & (places < lengths), "random"
    )


def sequences(data: Examples) -> Sequences:
    return Sequences(jnp.asarray(data.tokens), jnp.asarray(data.counted))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return read_model(folder).decoder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return read_model(hugging_face_folder(tmp_path_factory.mktemp("dense") / "model", seed=1)).decoder


def with_random_b(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter with random numbers in the place of B's zeros, so that A has a gradient too."""
    rng = np.random.default_rng(seed)
    return [
        {name: one._replace(b=jnp.asarray(rng.normal(0, 0.05, one.b.shape), jnp.float32)) for name, one in run.items()}
        for run in adapter
    ]


def peft_model(folder: Path, adapter: Adapter, path: Path, lora: Lora = LORA) -> Any:
    """PEFT's model with the adapter, ready to train."""
    from transformers import AutoModelForCausalLM

    path.mkdir()
    write_adapter(adapter, lora, read_model(folder).decoder, path, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, path, is_trainable=True)


def peft_loss(model: Any, data: Examples) -> torch.Tensor:
    """The mean cross entropy of the counted tokens."""
    ids, counted = torch.tensor(data.tokens, dtype=torch.long), torch.tensor(data.counted)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[counted[:, 1:]], ids[:, 1:][counted[:, 1:]])


def stored(adapter: Adapter, decoder: Decoder, path: Path, lora: Lora = LORA) -> dict[str, np.ndarray]:
    """The arrays of an adapter, or of its gradient, under the names of PEFT."""
    from safetensors.numpy import load_file

    path.mkdir()
    write_adapter(adapter, lora, decoder, path, "base")
    return load_file(path / "adapter_model.safetensors")


@PEFT
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "qwen3_moe"])
def test_gradients_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Of every factor, to 1e-4 of its norm; fused modules have the blocks of our factors."""
    changes = {"mlp_only_layers": [], "num_hidden_layers": 2} if family == "qwen3_moe" else {}
    folder = hugging_face_folder(tmp_path / "model", family, **changes)
    decoder, data = read_model(folder).decoder, examples()
    adapter = with_random_b(initial(decoder, LORA, 0))
    gradient, found = gradients.backward(TrainedAdapter(LORA))(
        adapter, decoder, Part(None, sequences(data), CE, jnp.float32(1 / data.targets), jax.random.key(0))
    )
    model = peft_model(folder, adapter, tmp_path / "adapter")
    loss = peft_loss(model, data)
    loss.backward()
    assert float(found.cross_entropy) / data.targets == pytest.approx(loss.item(), rel=1e-5)
    ours = stored(gradient, decoder, tmp_path / "gradient")
    theirs = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        # A's blocks of a fused module meet zeros of B that we do not store, where PEFT has a gradient of B.
        fused = "query_key_value" in name or "experts.base_layer" in name
        mask = ours[name] != 0 if fused and "lora_B" in name else 1.0
        expected = mask * expected.numpy()
        assert np.linalg.norm(ours[name] - expected) <= 1e-4 * np.linalg.norm(expected), name


@PEFT
def test_losses_of_twenty_updates_are_those_of_peft(folder: Path, decoder: Decoder, tmp_path: Path) -> None:
    data, training = examples(), replace(TRAINING, steps=20, validate_every=1, warmup=5, last=True)
    recovered = recover_decoder(decoder, Texts(data), sections(training), seed=3)
    model = peft_model(folder, initial(decoder, LORA, 3), tmp_path / "adapter")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: step / 5 if step < 5 else max(0.0, (20 - step) / 15)
    )
    for update, point in enumerate(recovered.outcome.points[1:]):
        tokens, counted = data.take(rows_of(update, data.count, 4, 3))
        loss = peft_loss(model, Examples(tokens, counted, ""))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        assert point.loss == pytest.approx(loss.item(), abs=1e-3)
    first, last = loss_of(recovered, 1), loss_of(recovered, -1)
    assert last < first - 0.1


def loss_of(recovered: Recovered, number: int) -> float:
    """The training loss of a point."""
    loss = recovered.outcome.points[number].loss
    assert loss is not None
    return loss


def sections(training: Training = TRAINING, **more: Any) -> Sections:
    shape = {"rank": LORA.rank, "alpha": LORA.alpha}
    made = Sections(training, **more)
    return replace(made, adapter=replace(made.adapter, **shape))


def run(decoder: Decoder, made: Sections, **more: Any) -> Recovered:
    return recover_decoder(decoder, Texts(examples(), examples(4, seed=1), examples(3, seed=2)), made, **more)


def same(first: Any, second: Any) -> bool:
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in leaves)


METHODS = {
    "lora": sections(),
    "full": sections(replace(TRAINING, method="full")),
    "forward": sections(replace(TRAINING, method="forward")),
    "norms": sections(replace(TRAINING, method="forward"), forward=ForwardOnly("norms", 2)),
    "mezo": sections(replace(TRAINING, method="forward", learning_rate=2e-3), forward=ForwardOnly("matrices", 4)),
}


def test_curves_are_cross_entropies_whatever_the_weights_of_the_loss(decoder: Decoder, dense: Decoder) -> None:
    """A model that hardly moves: the loss changes with its weights, the curves do not."""
    data = examples()
    training = replace(TRAINING, batch=data.count, micro_batch=data.count, steps=3, validate_every=1, warmup=0)
    made = sections(replace(training, learning_rate=1e-9))
    points = run(decoder, made, teacher=teacher.in_memory(dense)).outcome.points
    losses = np.asarray([[p.loss, p.cross_entropy, p.validation, p.watched] for p in points[1:]], float)
    assert np.ptp(losses[:, 0]) > 0.1, "weights and temperature of the loss change"
    assert np.ptp(losses[:, 1:], axis=0).max() < 1e-5
    own = mean_loss(decoder, TrainedArrays("norms"), {}, data, data.count)
    np.testing.assert_allclose(losses[:, 1], own, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_continues_bit_for_bit(decoder: Decoder, tmp_path: Path, method: str) -> None:
    made = METHODS[method]
    made = replace(made, adapter=replace(made.adapter, dropout=0.1 if method == "lora" else 0.0))
    whole = run(decoder, made)

    class BreakError(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise BreakError

    with Store(tmp_path / "state", {"a": 1}, "a recovery", save_every=0.0) as store, pytest.raises(BreakError):
        run(decoder, made, store=store, progress=interrupt)
    with Store(tmp_path / "state", {"a": 1}, "a recovery", save_every=0.0) as store:
        continued = run(decoder, made, store=store)
    assert same(continued.outcome.parameters, whole.outcome.parameters)
    assert continued.outcome.points == whole.outcome.points
    assert 0 < continued.outcome.tokens_here < whole.outcome.tokens_here == whole.outcome.tokens
    with (
        Store(tmp_path / "state", {"a": 2}, "a recovery") as store,
        pytest.raises(InputError, match="another a"),
    ):
        run(decoder, made, store=store)


def test_micro_batches_do_not_change_the_result(decoder: Decoder) -> None:
    one, four = (run(decoder, sections(replace(TRAINING, micro_batch=size, steps=3))).outcome.points for size in (4, 1))
    for first, second in zip(one[1:], four[1:], strict=True):
        assert second == pytest.approx(first, rel=1e-5)


def test_the_base_is_unchanged_and_the_merged_model_has_the_loss_of_the_adapter(decoder: Decoder) -> None:
    before = jax.tree.map(np.asarray, decoder)
    recovered = run(decoder, sections())
    assert arrays_equal(before, decoder)
    best = min(recovered.outcome.points[1:], key=lambda point: point.validation)
    assert recovered.outcome.update == best.update
    untrained = TrainedArrays("norms")
    merged = mean_loss(recovered.decoder, untrained, untrained.initial(recovered.decoder, 0), examples(4, seed=1), 2)
    assert merged == pytest.approx(best.validation, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_training_loss(decoder: Decoder, method: str) -> None:
    made = METHODS[method]
    training = replace(made.training, steps=12, validate_every=4, last=True, warmup=0, schedule="constant")
    recovered = run(decoder, replace(made, training=training))
    assert loss_of(recovered, -1) < loss_of(recovered, 1)


def test_full_training_changes_every_parameter_and_norms_only_norms(decoder: Decoder) -> None:
    full = run(decoder, METHODS["full"]).decoder
    changed = {
        path for path, array in named_arrays(full) if not np.array_equal(array, dict(named_arrays(decoder))[path])
    }
    assert changed == {path for path, _ in named_arrays(decoder)}
    norms = run(decoder, METHODS["norms"]).decoder
    changed = {
        path for path, array in named_arrays(norms) if not np.array_equal(array, dict(named_arrays(decoder))[path])
    }
    assert changed == {path for path, _ in named_arrays(decoder) if "norm" in path}


def test_biases_of_experts_and_routers_are_biases() -> None:
    names = ("gate", "gate_bias", "down_bias", "router", "router_bias", "choice_bias")
    trained = [name for name in names if TrainedArrays("all-small").trains(f"runs.0.experts.{name}")]
    assert trained == ["gate_bias", "down_bias", "router_bias"]


def test_the_estimate_from_forward_passes_approaches_the_gradient(decoder: Decoder) -> None:
    trained, data = TrainedArrays("norms"), examples(8)
    parameters = trained.initial(decoder, 0)
    part = Part(None, sequences(data), CE, jnp.float32(1 / data.targets), jax.random.key(0))
    exact, sums = gradients.backward(trained)(parameters, decoder, part)
    estimate, mean = jax.jit(gradients.forward(trained, 128, 1e-3))(parameters, decoder, part)
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (exact, estimate))
    # 8 · 128 directions in 448 dimensions: each sequence is estimated alone.
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.5
    assert a @ b / (a @ a) == pytest.approx(1, abs=0.25)
    assert float(mean.cross_entropy) == pytest.approx(float(sums.cross_entropy), rel=1e-3)


def test_mezo_moves_all_matrices_by_the_slope_of_the_loss_along_drawn_directions(decoder: Decoder) -> None:
    """Against a step by hand, with whole directions, for micro-batches of half an update."""
    data, epsilon, rate, trained = examples(4), 1e-3, 1e-2, TrainedMatrices()
    rule = Mezo(optax.constant_schedule(rate), 2, 1, epsilon, 5)
    key = jax.random.fold_in(jax.random.fold_in(directions.stream_key(5, "mezo"), 0), 0)
    drawn = [
        {
            name: jnp.stack(
                [
                    directions.draw(key, jnp.int32(layer), name, kernel.shape[1:], "gaussian")
                    for layer in range(len(kernel))
                ]
            )
            for name, kernel in run.items()
        }
        for run in trained.initial(decoder, 0)
    ]

    def moved(length: float) -> Any:
        return jax.tree.map(lambda kernel, z: kernel + length * z, trained.initial(decoder, 0), drawn)

    def total(matrices: Any) -> float:
        found = objective.sums(
            decoder, trained.hidden(matrices, decoder, jnp.asarray(data.tokens), None), sequences(data)
        )
        return float(found.cross_entropy) / data.targets

    slope = (total(moved(epsilon)) - total(moved(-epsilon))) / (2 * epsilon)
    matrices, program = trained.initial(decoder, 0), rule.program()
    state = rule.init(matrices)
    for part in (slice(0, 2), slice(2, 4)):
        half = Sequences(jnp.asarray(data.tokens[part]), jnp.asarray(data.counted[part]))
        matrices, state, _ = program(matrices, state, decoder, Part(None, half, CE, jnp.float32(2 / data.targets), key))
    assert int(state.update) == 1
    for found, expected in zip(jax.tree.leaves(matrices), jax.tree.leaves(moved(-rate * slope)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-4 * rate * abs(slope) + 1e-6)


# ------------------------------------------------------------------------------------------------------ divergence


def test_the_divergence_is_that_of_the_definition(decoder: Decoder, dense: Decoder) -> None:
    data, temperature = examples(), 1.7
    hidden = TrainedArrays("norms").hidden({}, decoder, jnp.asarray(data.tokens), None)
    found = objective.sums(decoder, hidden, sequences(data), dense, temperature)
    p, q = (jax.nn.log_softmax(model(jnp.asarray(data.tokens))[:, :-1] / temperature) for model in (dense, decoder))
    by_hand = jnp.sum(jnp.exp(p) * (p - q), axis=-1)[data.counted[:, 1:]].sum()
    assert float(found.divergence) == pytest.approx(float(by_hand), rel=1e-5)
    assert float(objective.loss(found, Weights(0.25, temperature))) == pytest.approx(
        0.25 * temperature**2 * float(by_hand) + 0.75 * float(found.cross_entropy), rel=1e-5
    )


def test_the_divergence_from_itself_is_zero(decoder: Decoder) -> None:
    hidden = TrainedArrays("norms").hidden({}, decoder, jnp.asarray(examples().tokens), None)
    assert abs(float(objective.sums(decoder, hidden, sequences(examples()), decoder, 2.0).divergence)) < 1e-3


def test_a_teacher_in_a_folder_is_the_teacher(decoder: Decoder, dense: Decoder, tmp_path: Path) -> None:
    """With all tokens kept, the same losses; with few, at most the divergence of the whole vocabulary at T = 1."""
    data = examples()
    for top in (97, 8):  # the vocabulary, and a part of it
        folder = tmp_path / str(top)
        folder.mkdir()
        teacher.write(folder, dense, data, top, 6, lambda done, total: None)
    distillation = Distillation(temperature=(1.0, 1.0))
    made = sections(replace(TRAINING, loss="kd"), distillation=distillation)
    texts = Texts(data)

    def losses(known: Callable[..., Any]) -> list[float]:
        return [p.loss for p in recover_decoder(decoder, texts, made, teacher=known).outcome.points[1:]]

    identity = partial(teacher.identity_of, dense, data)
    inside, all_kept, few = (
        losses(known)
        for known in (
            teacher.in_memory(dense),
            teacher.read(tmp_path / "97", identity(97)),
            teacher.read(tmp_path / "8", identity(8)),
        )
    )
    assert all_kept == pytest.approx(inside, rel=1e-3)
    assert 0.1 * inside[0] < few[0] < inside[0]
    with pytest.raises(InputError, match="another top"):
        teacher.read(tmp_path / "8", identity(97))
    with pytest.raises(InputError, match="another text"):
        teacher.read(tmp_path / "8", teacher.identity_of(dense, examples(seed=9), 8))
    with pytest.raises(InputError, match="not a whole folder"):
        teacher.read(tmp_path, identity(8))


# ---------------------------------------------------------------------------------------------------------- stopping


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_state_before(decoder: Decoder) -> None:
    broken = jax.tree.map(lambda array: array, decoder)
    broken.final_norm.scale.set_value(broken.final_norm.scale[...].at[0].set(jnp.nan))
    outcome = run(broken, sections()).outcome
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("update 1: the loss is nan")
    assert outcome.update == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.parameters))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (sections(replace(TRAINING, micro_batch=3)), "--micro-batch must divide --batch, found 3 and 4"),
        (sections(replace(TRAINING, learning_rate=0.0)), "--learning-rate must be above 0"),
        (sections(replace(TRAINING, loss="kd")), "--loss kd measures the divergence from a teacher"),
        (sections(distillation=Distillation(weight=(0.9, 1.5))), "--kd-weight must lie in"),
        (replace(sections(), adapter=replace(sections().adapter, targets=("q", "head"))), "--targets must name some"),
        (replace(sections(), adapter=replace(sections().adapter, rank=0)), "--rank must be at least 1"),
    ],
)
def test_settings_out_of_their_range_are_one_sentence(decoder: Decoder, made: Sections, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(decoder, made)


def test_every_sequence_comes_once_in_every_epoch() -> None:
    rows = np.concatenate([rows_of(update, 10, 4, seed=5) for update in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:])
    assert not np.array_equal(rows_of(0, 10, 4, 5), rows_of(0, 10, 4, 6))
