"""The settings that a run reads: every option either decides something in the run, or is refused as idle."""

from dataclasses import replace
from typing import Any

import pytest

from minillm_jax.errors import InputError
from minillm_jax.recipes.recipe import Recipe, flags_of, load, options, with_options
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget, Data, Estimation, Output, Refit, Scoring


def recipe_of(name: str, **changes: Any) -> tuple[Recipe, dict[tuple[str, str], str]]:
    """A recipe with some options, and the flags of these options; a ratio unless there is a target."""
    base = load(name)
    if not any(option.startswith("target") for option in changes):
        base = replace(base, budget=replace(base.budget, ratio=0.2))
    return with_options(base, changes)


IDLE = [
    # A refit that is not there, or whose method does not read the option.
    ("ours", {"criterion": "wanda", "refit": "bias", "ridge": 5.0}, "--ridge"),
    ("ours", {"criterion": "wanda", "refit": "bias", "solver": "device"}, "--solver"),
    ("ours", {"criterion": "wanda", "refit": "bias", "refit_inputs": 0.5}, "--refit-inputs"),
    ("ours", {"refit": "none", "inner": 0.5}, "--inner"),
    ("ours", {"criterion": "wanda", "structures": "hidden", "alpha": 0.3}, "--alpha"),
    ("ours", {"structures": "layers", "refit": "least-squares"}, "--refit"),
    ("mini-llm", {"alpha": 0.5}, "--alpha"),
    ("mini-llm", {"ridge": 0.1}, "--ridge"),
    ("mini-llm", {"refit_inputs": 0.5}, "--refit-inputs"),
    ("mini-llm", {"solver": "device"}, "--solver"),
    # A budget that does not read the option.
    ("ours", {"structures": "channels", "round_heads_to": 4}, "--round-heads-to"),
    ("ours", {"structures": "heads", "round_width_to": 64}, "--round-width-to"),
    ("ours", {"structures": "layers", "round_width_to": 64}, "--round-width-to"),
    ("ours", {"structures": "channels", "heads": "query"}, "--heads"),
    ("ours", {"structures": "layers", "heads": "group"}, "--heads"),
    ("ours", {"structures": "layers", "rounds": 2}, "--rounds"),
    ("wanda-sp", {"structures": "hidden", "rounds": 2}, "--rounds"),
    ("ours", {"keep_at_least": 0.2, "budget": "uniform"}, "--keep-at-least"),
    ("ours", {"target_params": "5M", "ratio_of": "blocks"}, "--ratio-of"),
    # A criterion that does not read the option.
    ("wanda-sp", {"across": "max"}, "--across"),
    ("wanda-sp", {"factors": "magnitude"}, "--factors"),
    ("ours", {"within": "mean"}, "--within"),
    ("ours", {"across": "sum"}, "--across"),
    ("ours", {"activation_norm": "rms"}, "--activation-norm"),
    ("ours", {"criterion": "gate", "within": "mean"}, "--within"),
    ("ours", {"criterion": "gate", "activation_norm": "l2"}, "--activation-norm"),
    ("ours", {"criterion": "random", "within": "mean"}, "--within"),
    ("ours", {"criterion": "random", "across": "sum"}, "--across"),
    ("ours", {"criterion": "magnitude", "activation_norm": "l2"}, "--activation-norm"),
    ("mini-llm", {"factors": "magnitude,gradient", "activation_norm": "l2"}, "--activation-norm"),
    ("ours", {"structures": "layers", "criterion": "wanda"}, "--criterion"),
    # A gradient that is not read, or not estimated by what the option belongs to.
    ("ours", {"directions": 8}, "--directions"),
    ("wanda-sp", {"estimator": "jvp"}, "--estimator"),
    ("wanda-sp", {"difference": "jvp"}, "--difference"),
    ("mini-llm", {"factors": "magnitude,activation", "directions": 4}, "--directions"),
    ("mini-llm", {"rank": 2}, "--rank"),
    ("mini-llm", {"estimator": "jvp", "epsilon": 0.1}, "--epsilon"),
    ("ours", {"criterion": "gate", "epsilon": 0.1}, "--epsilon"),
    ("ours", {"criterion": "element-1", "directions": 4}, "--directions"),
    ("ours", {"criterion": "element-1", "rank": 2}, "--rank"),
    ("ours", {"criterion": "element-1", "distribution": "sphere"}, "--distribution"),
    ("ours", {"criterion": "element-1", "rng": "threefry2x32"}, "--rng"),
    ("ours", {"criterion": "gate", "estimator": "exact", "per_sequence": True}, "--per-sequence"),
    ("mini-llm", {"directions_per_step": 2, "memory": "1GB"}, "--memory"),
    # A calibration text on which nothing is computed.
    ("ours", {"criterion": "magnitude", "refit": "none", "samples": 8}, "--samples"),
    ("ours", {"criterion": "magnitude", "refit": "none", "seed": 8}, "--seed"),
    ("ours", {"criterion": "random", "refit": "none", "samples": 8}, "--samples"),
    ("wanda-sp", {"activation_norm": "none", "samples": 8}, "--samples"),
    # Files that are not written or read.
    ("ours", {"format": "flax", "max_shard_size": "1MB"}, "--max-shard-size"),
    ("ours", {"checkpoint": "saved"}, "--checkpoint"),
    ("mini-llm", {"structures": "hidden", "checkpoint": "saved"}, "--checkpoint"),
    ("ours", {"window": 64}, "--window"),
    # Experts that are not removed, and what their refit does not read.
    ("ours", {"round_experts_to": 2}, "--round-experts-to"),
    ("ours", {"expert_criterion": "frequency"}, "--expert-criterion"),
    ("ours", {"structures": "experts", "criterion": "wanda"}, "--criterion"),
    ("ours", {"structures": "experts", "refit_inputs": 0.5}, "--refit-inputs"),
    ("ours", {"structures": "experts", "refit": "none", "ridge": 0.1}, "--ridge"),
]


@pytest.mark.parametrize(("name", "changes", "flag"), IDLE, ids=str)
def test_an_option_in_vain_is_refused_with_the_choices_that_make_it_idle(
    name: str, changes: dict[str, Any], flag: str
) -> None:
    recipe, given = recipe_of(name, **changes)
    with pytest.raises(InputError) as error:
        used(recipe, given)
    sentence = str(error.value)
    assert sentence.startswith(f"{flag} would do nothing in this run (")
    assert sentence.endswith("); leave it out")
    # The same setting in a recipe file is no error: it is left out of the run.
    section, key = next(place for place, flag_given in given.items() if flag_given == flag)
    quiet = {place: flag_given for place, flag_given in given.items() if place != (section, key)}
    without = replace(recipe, **{section: replace(getattr(recipe, section), **{key: default_of(section, key)})})
    if (section, key) not in CHOICES:
        assert used(recipe, quiet).recipe == used(without, quiet).recipe


# Settings whose default suits none of the runs above: without them the run would be another one.
CHOICES = {("refit", "method"), ("scoring", "criterion")}


def default_of(section: str, key: str) -> Any:
    return getattr(getattr(Recipe(), section), key)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ours", {"criterion": "wanda", "ridge": 5.0, "alpha": 0.1, "refit_inputs": 0.3, "solver": "device"}),
        ("ours", {"refit": "none", "ridge": 5.0, "alpha": 0.1, "solver": "device"}),
        ("flap", {"alpha": 0.3, "samples": 8, "keep_at_least": 0.3, "within": "sum"}),
        ("mini-llm", {"directions": 4, "epsilon": "auto", "memory": "1GB", "checkpoint": "saved", "across": "sum"}),
        ("mini-llm", {"space": "low-rank", "rank": 2, "distribution": "sphere", "estimator": "jvp"}),
        ("ours", {"criterion": "gate", "per_sequence": True, "directions_per_step": 4, "rounds": 2}),
        ("ours", {"criterion": "random", "refit": "none", "seed": 4}),
        ("ours", {"criterion": "noise", "activation_norm": "none", "refit": "none", "seed": 4}),
        ("wanda-sp", {"structures": "hidden", "across": "sum", "round_width_to": 64}),
        ("wanda-sp", {"structures": "hidden,heads", "across": "sum", "round_heads_to": 2, "rounds": 2}),
        ("ours", {"structures": "layers", "layers": "1:-1", "samples": 8, "seed": 3}),
        ("wanda-sp", {"budget": "measured", "keep_at_least": 0.3, "ratio_of": "model"}),
        ("wanda-sp", {"budget": "global", "round_width_to": 64, "round_heads_to": 2, "rounds": 2}),
        ("ours", {"target_macs": "1G", "keep_at_least": 0.3, "round_width_to": 64}),
        ("ours", {"evaluate": "text.txt", "window": 64, "max_shard_size": "1MB", "format": "padded", "mesh": "data=1"}),
    ],
    ids=str,
)
def test_options_that_a_run_reads_are_kept(name: str, changes: dict[str, Any]) -> None:
    recipe, given = recipe_of(name, **changes)
    settings = used(recipe, given)
    for section, key in given:
        assert key in settings.keys[section]
        assert getattr(getattr(settings.recipe, section), key) == getattr(getattr(recipe, section), key)


# --------------------------------------------------------------------------------------- every option, every run

# Other values of the options that are no choice between words.
VALUES: dict[str, list[Any]] = {
    "calibration": ["other.txt"],
    "samples": [3],
    "seq_len": [16],
    "seed": [7],
    "ratio": [0.6],
    "target_params": [5e6],
    "target_macs": [5e9],
    "target_memory": [10**7],
    "structures": [
        ("heads",),
        ("channels",),
        ("hidden",),
        ("layers",),
        ("hidden", "heads"),
        ("experts",),
        ("expert-channels",),
    ],
    "layers": [(1, 3), (0, -1)],
    "rounds": [2],
    "round_heads_to": [2],
    "round_experts_to": [2],
    "round_width_to": [64],
    "keep_at_least": [0.3],
    "directions": [3],
    "epsilon": [0.1, None],
    "rank": [2],
    "per_sequence": [True],
    "directions_per_step": [2],
    "memory": [10**8],
    "factors": [("magnitude",), ("activation", "gradient")],
    "alpha": [0.25],
    "ridge": [0.5, None],
    "inputs": [0.25],
    "max_shard_size": ["1MB"],
    "checkpoint": ["saved"],
    "stream": [True],
    "mesh": ["data=2"],
    "hosts": ["auto"],
    "text": ["held-out.txt"],
    "field": ["content"],
    "window": [64],
    "continuations": [0],
}

BASES: list[tuple[str, dict[str, Any]]] = [
    ("ours", {}),
    ("mini-llm", {}),
    ("wanda-sp", {}),
    ("flap", {}),
    ("llm-pruner", {}),
    ("ours", {"refit": "none"}),
    ("ours", {"structures": "layers"}),
    ("ours", {"structures": "channels", "evaluate": "text.txt"}),
    ("wanda-sp", {"structures": "hidden"}),
    ("mini-llm", {"structures": "hidden"}),
    ("wanda-sp", {"structures": "hidden,layers,heads,channels"}),
    ("ours", {"criterion": "gate"}),
    ("ours", {"criterion": "gate", "estimator": "exact"}),
    ("ours", {"criterion": "magnitude", "refit": "none"}),
    ("ours", {"criterion": "random", "refit": "none"}),
    ("ours", {"criterion": "noise", "refit": "bias"}),
    ("mini-llm", {"space": "low-rank", "estimator": "jvp"}),
    ("mini-llm", {"directions_per_step": 2, "factors": "gradient"}),
    ("ours", {"format": "flax", "heads": "query", "rounds": 2}),
    ("ours", {"budget": "measured"}),
    ("wanda-sp", {"budget": "global", "ratio_of": "model"}),
    ("ours", {"target_params": "5M"}),
]


def other_values(section: str, key: str, current: Any) -> list[Any]:
    described = next(option for at, one, option in options() if (at, one.name) == (section, key))
    return [value for value in described.choices or VALUES[key] if value != current]


@pytest.mark.parametrize(("name", "changes"), BASES, ids=str)
def test_every_option_is_idle_or_decides_something(name: str, changes: dict[str, Any]) -> None:
    """Read settings keep their values; settings that are not read change nothing but the recipe they stand in."""
    base, _ = recipe_of(name, **changes)
    reference = used(base)
    outcomes = set()
    for section, one, _ in options():
        key, place, flag = one.name, (section, one.name), flags_of(section, one.name)
        for value in other_values(section, key, getattr(getattr(base, section), key)):
            changed = replace(base, **{section: replace(getattr(base, section), **{key: value})})
            try:
                settings = used(changed, {place: flag})
            except InputError as error:
                if f"{flag} would do nothing in this run" not in str(error):
                    outcomes.add("unsuitable")  # such a value is read, and refused for what it is
                    continue
                outcomes.add("idle")
                assert used(changed).recipe == reference.recipe, f"{flag} {value} is refused, but changes the run"
            else:
                outcomes.add("read")
                assert key in settings.keys[section], flag
                assert getattr(getattr(settings.recipe, section), key) == value, f"{flag} {value} is read in vain"
                assert settings.recipe != reference.recipe or implied(reference.recipe, section, key, value), flag
    assert {"idle", "read"} <= outcomes


def implied(recipe: Recipe, section: str, key: str, value: Any) -> bool:
    """Whether a run has this value already where its recipe leaves the setting out."""
    return getattr(getattr(recipe, section), key) == value


@pytest.mark.parametrize(("name", "changes"), BASES, ids=str)
def test_the_settings_that_a_run_reads_are_complete(name: str, changes: dict[str, Any]) -> None:
    """A run of these settings reads the same keys, and completes to the same settings."""
    base, given = recipe_of(name, **changes)
    settings = used(base, given)
    again = used(settings.recipe)
    assert again.recipe == settings.recipe
    assert again.keys == settings.keys


# ------------------------------------------------------------------------------------- values that do not suit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget()}, "give a ratio or a target for the pruned model, one of the two"),
        ({"budget": Budget(0.2, target_params=1e6)}, "give a ratio or a target for the pruned model, one of the two"),
        ({"budget": Budget(target_macs=1e6, target_params=1e6)}, "give one target"),
        ({"budget": Budget(0.0)}, "the ratio must lie between 0 and 1, both excluded, found 0"),
        ({"budget": Budget(0.2, ratio_of="heads")}, "unknown thing that the ratio counts 'heads'"),
        ({"budget": Budget(0.2, heads="pairs")}, "unknown way to count heads 'pairs'"),
        ({"budget": Budget(0.2, allocation="fair")}, "unknown allocation 'fair'"),
        ({"budget": Budget(0.2, structures=("layers", "layers"))}, "each of them once"),
        ({"budget": Budget(0.2, structures=("hidden",), ratio_of="model")}, "where hidden are removed; leave out"),
        ({"budget": Budget(0.2, structures=("hidden", "heads"), layers=(0, 2))}, "--layers cannot be used where"),
        ({"budget": Budget(0.2, allocation="global")}, "has no scores to compare between layers"),
        ({"budget": Budget(0.2, ratio_of="model", keep_at_least=1.0)}, r"--keep-at-least must lie in [0, 1), found 1"),
        ({"budget": Budget(0.2, round_width_to=0)}, "multiples of at least 1, not 0"),
        ({"budget": Budget(0.2, allocation="measured", round_heads_to=0)}, "multiples of at least 1, not 0"),
        ({"budget": Budget(0.2, structures=("ffn",))}, "unknown structure 'ffn'; expected one of heads, channels"),
        (
            {"budget": Budget(0.2, allocation="measured"), "output": Output("stock")},
            "measured budgets keep unequal numbers in the layers, which no stock class can hold",
        ),
        ({"data": Data(seed=-1), "scoring": Scoring("random")}, "--seed must lie between 0 and"),
        ({"refit": Refit("prayer")}, "unknown refit 'prayer'"),
        ({"refit": Refit(solver="moon")}, "unknown solver 'moon'"),
        ({"scoring": Scoring("fms", factors=())}, "fms needs at least one factor"),
        ({"scoring": Scoring("element-2"), "gradient": Estimation("spsa")}, "takes the squared gradients"),
        ({"scoring": Scoring("gate"), "gradient": Estimation(space="weights")}, "takes directions in the space gates"),
        ({"scoring": Scoring("fms"), "gradient": Estimation(per_sequence=True)}, "needs the space gates"),
        (
            {"scoring": Scoring("element-1"), "output": Output(checkpoint="saved")},
            "the exact gradient is one pass and cannot be resumed; leave out --checkpoint",
        ),
        (
            {"scoring": Scoring("fms"), "output": Output(checkpoint="saved"), "budget": Budget(0.2, rounds=2)},
            "a checkpoint holds one estimate and cannot be used with several rounds",
        ),
    ],
)
def test_settings_that_do_not_suit_each_other(changes: dict[str, Any], message: str) -> None:
    recipe = replace(Recipe(budget=Budget(0.2)), **changes)
    with pytest.raises(InputError) as error:
        used(recipe)
    assert message in str(error.value)


def test_a_run_gives_its_seed_and_window_to_every_section() -> None:
    recipe, given = recipe_of("mini-llm", seed=5, seq_len=32)
    settings = used(recipe, given).recipe
    assert settings.gradient.seed == settings.scoring.estimation.seed == settings.data.seed == 5
    assert settings.budget.window == 32
    recipe, given = recipe_of("ours", criterion="noise", seed=5)
    assert used(recipe, given).recipe.scoring.seed == 5
