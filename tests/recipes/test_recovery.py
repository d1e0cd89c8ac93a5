"""Recipes of recover: the files of the package, their settings, and the way back to TOML."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from minillm_jax.errors import InputError
from minillm_jax.recipes import recipe as recipes
from minillm_jax.recipes import used_recovery
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recovery.settings import Lora


def test_the_recipes_of_the_package_are_whole_and_can_be_run() -> None:
    assert recipes.names(Recovery) == ["distil", "forward", "llm-pruner", "mezo"]
    for name in recipes.names(Recovery):
        loaded = recipes.load_as(Recovery, name)
        assert loaded.summary.endswith(".") or loaded.summary.endswith(").")
        used_recovery.check(loaded)
    published = recipes.load_as(Recovery, "llm-pruner")
    assert (published.data.template, published.data.loss_on, published.training.batch) == ("alpaca", "response", 64)
    assert (published.training.epochs, published.training.learning_rate, published.training.warmup) == (2.0, 1e-4, 100)
    assert replace(published.computed.lora(), targets=()) == Lora(8, 16.0, 0.05, ())
    ours = recipes.load_as(Recovery, "distil")
    assert ours.computed.lora().rank == 32
    assert [recipes.with_options(ours, {"rank": str(rank)})[0].computed.lora().scale for rank in (4, 64)] == [2.0, 2.0]
    assert recipes.load_as(Recovery, "distil").distillation == Recovery().distillation
    assert Recovery().distillation.weight == (0.9, 0.5)
    assert Recovery().distillation.temperature == (2.0, 1.0)


def test_every_flag_belongs_to_one_setting() -> None:
    flags = [d.flag or one.name for _, one, d in recipes.options(Recovery)]
    assert [name for name, count in Counter(flags).items() if count > 1] == []
    assert recipes.places(Recovery).keys() == set(flags)


def test_toml_holds_every_setting(tmp_path: Path) -> None:
    given = {"kd_weight": "1:0.25", "targets": "q,v", "steps": "7", "method": "full", "learning_rate": "1e-5"}
    changed, flags = recipes.with_options(Recovery(), given)
    assert flags["distillation", "weight"] == "--kd-weight"
    (tmp_path / "mine.toml").write_text(recipes.to_toml(changed, recipes.all_keys(Recovery)))
    read = recipes.load_as(Recovery, str(tmp_path / "mine.toml"))
    assert (read.distillation, read.adapter, read.training) == (changed.distillation, changed.adapter, changed.training)
    assert read.distillation.weight == (1.0, 0.25)


def test_sections_of_prune_are_unknown_to_recover(tmp_path: Path) -> None:
    (tmp_path / "prune.toml").write_text("[budget]\nratio = 0.1\n")
    with pytest.raises(InputError, match="unknown section 'budget'; expected one of data, training, adapter"):
        recipes.load_as(Recovery, str(tmp_path / "prune.toml"))
    with pytest.raises(InputError, match="did you mean learning_rate"):
        recipes.with_assignments(Recovery(), ["training.learning_rat=1"])
