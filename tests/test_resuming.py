"""Interrupted prunings: the same command goes on from the work folder and writes the bits of an uninterrupted run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minillm_jax.errors import InputError
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.run import Job, run
from minillm_jax.settings import Data
from tests.helpers import hugging_face_folder, random_tokens


class Interrupted(Exception):  # noqa: N818  not an error
    """Ends a run in the place of a signal."""


# A call of the progress: stage, finished steps, all steps.
Call = tuple[str, int, int]


def prune(root: Path, output: str, until: tuple[list[Call], int] | None = None, **options: Any) -> list[Call]:
    """Prunes the model in a folder, and returns all calls of the progress.

    Args:
      root: the folder of the model and of the tokens.
      output: name of the output folder.
      until: the calls of a whole run, and the place of the one at which this run is interrupted. A run that goes on
        makes some of the calls only.
      **options: of the command line.
    """
    told: list[Call] = []
    place = -1

    def progress(*call: Any) -> None:
        nonlocal place
        told.append(call)
        if until is not None:
            place = until[0].index(call, place + 1)
            if place >= until[1]:
                raise Interrupted

    base = Recipe(data=Data(str(root / "tokens.npy"), 6, 24))
    recipe, given = recipes.with_options(base, {"ratio": 0.5} | options)
    run(Job(str(root / "model"), str(root / output), recipe, given), progress)
    return told


def check_equal(left: Path, right: Path) -> None:
    """Equal weight files and equal pruning records, byte for byte."""
    files = [*sorted(path.name for path in left.glob("model*.safetensors")), "pruning.json"]
    assert [name for name in files if (left / name).read_bytes() != (right / name).read_bytes()] == []


def make_model(root: Path, family: str = "llama", **changes: Any) -> Path:
    np.save(root / "tokens.npy", random_tokens(97, 600))
    layers = {"bloom": "n_layer"}.get(family, "num_hidden_layers")
    hugging_face_folder(root / "model", family, **{layers: 3, **changes})
    return root


CASES = [
    ("llama", {}),
    ("llama", {"heads": "query", "criterion": "wanda"}),
    ("opt", {"criterion": "wanda", "refit": "bias"}),
    ("bloom", {"allocation": "measured"}),
    ("llama", {"criterion": "fms", "directions": 4, "rounds": 2}),
    ("llama", {"structures": ("attention", "channels"), "allocation": "curves"}),
    ("qwen3_moe", {"structures": ("heads", "channels", "experts"), "ratio": 0.2}),
    ("olmo2", {"allocation": "uniform"}),  # one norm over the queries of all heads
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_an_interrupted_pruning_goes_on_bit_for_bit(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    root = make_model(tmp_path, family)
    calls = prune(root, "whole", None, **options)
    assert not (root / "whole.checkpoint").exists()
    for share in (0.35, 0.6, 0.9):  # each time further, from where the last one was interrupted
        with pytest.raises(Interrupted):
            prune(root, "resumed", (calls, int(share * len(calls))), **options)
        assert not (root / "resumed").exists()
    prune(root, "resumed", None, **options)
    assert not (root / "resumed.checkpoint").exists()
    check_equal(root / "whole", root / "resumed")


def test_finished_layers_and_losses_are_read_and_not_computed_again(tmp_path: Path) -> None:
    """What the work folder holds decides the result: changed values come out in the written model."""
    root = make_model(tmp_path)
    prune(root, "whole", allocation="uniform")
    work = interrupted(root, "resumed")
    names = sorted(path.name for path in work.glob("*.safetensors"))
    assert [name for name in names if name.startswith("round")] == ["round-0-layer-00000.safetensors"]
    assert "budget.safetensors" in names
    part = work / "round-0-layer-00000.safetensors"
    change(part, "mlp.down.kernel", lambda kernel: kernel + 1)
    prune(root, "resumed", allocation="uniform")
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (load_file(root / folder / "model.safetensors") for folder in ("whole", "resumed"))
    np.testing.assert_allclose(after[name], before[name] + 1, atol=1e-6)


def change(part: Path, name: str, new: Any) -> None:
    from safetensors import safe_open

    arrays = load_file(part)
    with safe_open(part, framework="numpy") as file:
        metadata = file.metadata()
    save_file(arrays | {name: new(arrays[name])}, part, metadata)


OTHER_JOBS = [
    ({"ratio": 0.25}, r"another budget\.ratio \(0\.5, not 0\.25\); remove the folder to begin anew"),
    ({"ridge": 0.1}, r"another refit\.ridge"),
    ({"seed": 5}, r"another calibration text"),
]


def interrupted(root: Path, output: str) -> Path:
    """The work folder of a run that was interrupted in its second layer."""
    calls: list[Call] = [("refit", done, 6) for done in range(1, 7)]
    with pytest.raises(Interrupted):
        prune(root, output, (calls, 2), allocation="uniform")
    return root / f"{output}.checkpoint"


def test_the_work_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    root = make_model(tmp_path)
    interrupted(root, "resumed")
    for change, message in OTHER_JOBS:
        with pytest.raises(InputError, match=message):
            prune(root, "resumed", **{"allocation": "uniform"} | change)


def test_a_layer_that_was_pruned_from_other_weights_is_refused(tmp_path: Path) -> None:
    root = make_model(tmp_path)
    interrupted(root, "resumed")
    weights = load_file(root / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, root / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="layer 0 was pruned from other weights than those of the model"):
        prune(root, "resumed", allocation="uniform")


def test_a_damaged_part_and_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    root = make_model(tmp_path)
    part = interrupted(root, "resumed") / "round-0-layer-00000.safetensors"
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(InputError, match=f"{part.name}: not a whole part of a pruning"):
        prune(root, "resumed", allocation="uniform")
    foreign = root / "other.checkpoint"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other\.checkpoint: the folder holds something else than a pruning"):
        prune(root, "other")
