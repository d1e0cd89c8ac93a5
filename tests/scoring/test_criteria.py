"""Criteria of other papers against PyTorch: gradients by autograd, activations by hooks, formulas in the tests.

The model has grouped queries: all query rows of a key/value head are one structure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.reader import read_model
from minillm_jax.data.batches import Batches
from minillm_jax.data.windows import Calibration
from minillm_jax.errors import InputError
from minillm_jax.model.loaded import Model
from minillm_jax.scoring.gradient.settings import resolve as resolve_estimation
from minillm_jax.scoring.score import resolve, score
from minillm_jax.settings import Estimation, Scoring
from tests.helpers import hugging_face_folder, load_torch, random_tokens

LAYERS, HEADS, CHANNELS = 3, 4, 40
PROJECTIONS = {"head": "self_attn.o_proj", "channel": "mlp.down_proj"}
MATRICES = {
    "head": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "channel": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
COUNTS = {"head": HEADS, "channel": CHANNELS}


@dataclass(frozen=True)
class Reference:
    """Arrays of PyTorch, by layer and name of the module.

    Attributes:
      weights: weights [out, in].
      gradients: gradients of the mean loss.
      squares: mean over the windows of the squared gradients.
      inputs: inputs of the output projections.
    """

    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face_folder(tmp_path_factory.mktemp("criteria") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return read_model(folder)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(Batches(random_tokens(97, 5, 17)), "random", 0)


@pytest.fixture(scope="module")
def reference(folder: Path, calibration: Calibration) -> Reference:
    twin, recorded = load_torch(folder), {}
    modules = {f"{layer}.{name}": twin.get_submodule(f"model.layers.{layer}.{name}") for layer, name in places()}
    for name in (name for name in modules if name.split(".", 1)[1] in PROJECTIONS.values()):
        modules[name].register_forward_pre_hook(lambda _, x, name=name: recorded.setdefault(name, []).append(x[0][0]))
    windows = torch.from_numpy(calibration.batches.windows.astype(np.int64))
    squares = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    total = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    for window in windows:
        twin.zero_grad()
        twin(window[None], labels=window[None]).loss.backward()
        for name, module in modules.items():
            squares[name] += module.weight.grad.square() / len(windows)
            total[name] += module.weight.grad / len(windows)
    weights = {name: module.weight.detach() for name, module in modules.items()}
    return Reference(weights, total, squares, {name: torch.cat(parts).detach() for name, parts in recorded.items()})


def places() -> list[tuple[int, str]]:
    return [(layer, name) for layer in range(LAYERS) for names in MATRICES.values() for name in names]


def parts(values: torch.Tensor, name: str, kind: str) -> torch.Tensor:
    """The structures of a stored matrix [out, in]: columns of an output projection, rows of any other matrix."""
    rows = values.T if name in PROJECTIONS.values() else values
    return rows.reshape(COUNTS[kind], -1)


def scores_by_hand(kind: str, layer: int, of_matrix: Callable[[str], torch.Tensor]) -> np.ndarray:
    """Scores of LLM-Pruner: the sum over the matrices of a group."""
    return sum(of_matrix(name) for name in MATRICES[kind]).numpy()  # type: ignore[union-attr]


def taylor(reference: Reference, key: str, criterion: str) -> torch.Tensor:
    weight, gradient, square = reference.weights[key], reference.gradients[key], reference.squares[key]
    if criterion == "element-2":
        return weight * square * weight
    if criterion == "mixed":
        return weight * gradient - 0.5 * weight * square * weight
    return weight * gradient


@pytest.mark.parametrize("criterion", ["vector", "element-1", "element-2", "mixed"])
def test_taylor_expansions(model: Model, calibration: Calibration, reference: Reference, criterion: str) -> None:
    """The exact gradient is the default of these criteria."""
    scores = score(model, calibration, Scoring(criterion)).groups
    for kind in MATRICES:
        for layer in range(LAYERS):

            def of_matrix(name: str, layer: int = layer, kind: str = kind) -> torch.Tensor:
                values = parts(taylor(reference, f"{layer}.{name}", criterion), name, kind)
                return values.sum(dim=1).abs() if criterion == "vector" else values.abs().sum(dim=1)

            expected = scores_by_hand(kind, layer, of_matrix)
            np.testing.assert_allclose(scores[kind][layer], expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_wanda_sp(model: Model, calibration: Calibration, reference: Reference) -> None:
    scores = score(model, calibration, Scoring("wanda")).groups
    for kind, name in PROJECTIONS.items():
        for layer in range(LAYERS):
            key = f"{layer}.{name}"
            values = reference.weights[key].abs() * reference.inputs[key].norm(dim=0)
            np.testing.assert_allclose(scores[kind][layer], parts(values, name, kind).sum(dim=1), rtol=1e-4)


def test_flap(model: Model, calibration: Calibration, reference: Reference) -> None:
    """Variance of a feature times the squared norm of its weights, standardised over the features of a layer."""
    scores = score(model, calibration, Scoring("flap")).groups
    for kind, name in PROJECTIONS.items():
        for layer in range(LAYERS):
            key = f"{layer}.{name}"
            features = reference.inputs[key].var(dim=0) * reference.weights[key].square().sum(dim=0)
            standardised = (features - features.mean()) / features.std()
            expected = standardised.reshape(COUNTS[kind], -1).mean(dim=1)
            np.testing.assert_allclose(scores[kind][layer], expected, rtol=1e-3, atol=1e-4)


def test_magnitude_l1(model: Model, calibration: Calibration, reference: Reference) -> None:
    scores = score(model, calibration, Scoring("magnitude-l1")).groups
    for kind, names in MATRICES.items():
        structures = [parts(reference.weights[f"1.{name}"], name, kind).abs().sum(dim=1).numpy() for name in names]
        np.testing.assert_allclose(scores[kind][1], np.max(structures, axis=0), rtol=1e-5)


@pytest.mark.parametrize("factors", [("gradient",), ("activation", "gradient"), ("magnitude", "gradient")])
def test_fms_without_some_of_its_factors(
    model: Model, calibration: Calibration, reference: Reference, factors: tuple[str, ...]
) -> None:
    scoring = Scoring("fms", Estimation("exact"), factors=factors)
    scores, name = score(model, calibration, scoring).groups, "mlp.down_proj"
    only_down = score(model, calibration, Scoring("fms", Estimation("exact"), factors=factors, across="last")).groups
    for layer in range(LAYERS):
        key = f"{layer}.{name}"
        values = reference.gradients[key].abs()
        if "magnitude" in factors:
            values = values * reference.weights[key].abs()
        if "activation" in factors:
            values = values * reference.inputs[key].norm(dim=0)
        expected = parts(values, name, "channel").sum(dim=1)
        np.testing.assert_allclose(only_down["channel"][layer], expected, rtol=1e-3)
        assert (scores["channel"][layer] >= 0.999 * expected.numpy()).all(), "the maximum over all structures"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"criterion": "fms", "factors": ()}, "fms needs at least one factor"),
        ({"criterion": "fms", "factors": ("magnitude", "magnitude")}, "each factor once"),
        (
            {"criterion": "fms", "factors": ("weight",)},
            "unknown factor 'weight'; expected one of magnitude, activation, gradient",
        ),
        (
            {"criterion": "mixed", "estimation": Estimation("jvp")},
            "mixed takes the squared gradients of single windows",
        ),
        ({"criterion": "vector", "estimation": Estimation(space="gates")}, "weights or low-rank"),
    ],
)
def test_contradictory_settings_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve(Scoring(**changes))


def test_only_fms_reads_factors() -> None:
    with pytest.raises(InputError, match="the criterion wanda does not read factors, which would do nothing"):
        resolve(Scoring("wanda", factors=("magnitude",)))
    assert resolve(Scoring("fms", factors=("magnitude",)))[0].factors == ("magnitude",)


def test_squared_gradients_need_the_exact_gradient_by_weights() -> None:
    with pytest.raises(InputError, match="come with the exact gradient by weights only"):
        resolve_estimation(Estimation("jvp", "gates", curvature=True))
