"""Recipes: the files of the package, the errors of a file, options, `--set`, and the way back to TOML."""

import tempfile
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.writer import check_shard_size
from minillm_jax.errors import InputError
from minillm_jax.options import COUNT, LAYERS, SHARDS, STEP, WORDS, Option, read_bytes
from minillm_jax.recipes.recipe import (
    PANELS,
    SECTIONS,
    Recipe,
    as_table,
    flags_of,
    load,
    names,
    options,
    places,
    to_toml,
    with_assignments,
    with_options,
)
from minillm_jax.recipes.recovery import Recovery
from minillm_jax.recipes.used import used
from minillm_jax.settings import Budget, Data, Estimation, Refit, Scoring, dtype_name

ALL_KEYS = {section: {one.name for at, one, _ in options() if at == section} for section in SECTIONS}

# ------------------------------------------------------------------------------------------ recipes of the package

# The settings of each published method; `ours` is the defaults.
DOCUMENTED = {
    "ours": {},
    "flap": {
        "data": {"samples": 1024, "seq_len": 128, "bos": "no"},
        "budget": {"allocation": "global"},
        "scoring": {"criterion": "flap"},
        "refit": {"method": "bias"},
    },
    "llm-pruner": {
        "data": {"samples": 10, "seq_len": 64, "bos": "no"},
        "budget": {"layers": "4:-2"},
        "scoring": {"criterion": "element-1"},
        "refit": {"method": "none"},
    },
    "mini-llm": {
        "data": {"samples": 10, "seq_len": 128, "bos": "no"},
        "scoring": {"criterion": "fms"},
        "refit": {"method": "none"},
    },
    "wanda-sp": {
        "data": {"samples": 10, "seq_len": 128, "bos": "no"},
        "scoring": {"criterion": "wanda"},
        "refit": {"method": "none"},
    },
}


def test_the_recipes_of_the_package_are_the_documented_ones() -> None:
    assert names() == list(DOCUMENTED)
    assert {name: as_table(load(name)) for name in names()} == DOCUMENTED
    for name in names():
        recipe = load(name)
        assert recipe.name == name
        assert recipe.summary.endswith(".")
        used(replace(recipe, budget=replace(recipe.budget, ratio=0.2)))


def test_the_default_recipe_is_structured_obs_with_least_squares() -> None:
    recipe = load()
    assert replace(recipe, summary="") == Recipe()
    assert recipe.data == Data(None, None, None, 0)
    assert (recipe.scoring.criterion, recipe.refit.method, recipe.refit.ridge) == ("obs", "least-squares", None)
    assert (recipe.budget.allocation, recipe.budget.structures) == (None, ("heads", "channels"))
    assert (recipe.gradient.directions, recipe.gradient.epsilon) == (16, 1e-3)


def test_every_file_of_the_package_writes_no_default() -> None:
    for path in Recipe.FOLDER.glob("*.toml"):
        table = tomllib.loads(path.read_text())
        assert {section: values for section, values in table.items() if section != "summary"} == as_table(load(path))


# -------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[refits]\nridge = 1", "unknown section 'refits'; expected one of data, budget, "),
        ("ridge = 1", "unknown section 'ridge'"),
        ("budget = 3", "unknown section 'budget' with the value '3'; expected a table of settings, [budget]"),
        ("summary = 3", "summary must be text, found '3'"),
        ("[summary]\nratio = 1", "summary must be text, found "),
        ("origin = 'here'", "origin must be a table, [origin], found 'here'"),
        ("[origin]\nmodel = 3", "origin.model must be text, found '3'"),
        ("[origin]\nrevision = ['main']", "origin.revision must be text, found "),
        ("[origin]\ntokens_sha256 = true", "origin.tokens_sha256 must be text, found 'True'"),
        ("[[budget]]\nratio = 0.2", "unknown section 'budget' with the value "),
        ("refit = 'none'", "unknown section 'refit'"),
        ("[refit]\nmidge = 1", "refit.midge: unknown key; expected one of method, alpha, ridge, inputs, solver"),
        ("[gradient]\nseed = 1", "gradient.seed: unknown key"),
        ("[budget]\nwindow = 64", "budget.window: unknown key"),
        ("[refit]\nridge = 'much'", "refit.ridge 'much' is not a number"),
        ("[data]\nsamples = 2.5", "data.samples must be a whole number, found '2.5'"),
        ("[data]\nsamples = true", "data.samples must be a whole number, found 'True'"),
        ("[refit]\nridge = true", "refit.ridge must be written like 1e-3, found 'True'"),
        ("[data]\ncalibration = 3", "data.calibration must be text, found '3'"),
        ("[gradient]\nper_sequence = 'maybe'", "gradient.per_sequence must be true or false, found 'maybe'"),
        ("[scoring]\ncriterion = 'best'", ": unknown scoring.criterion 'best'; expected one of obs, wanda, flap, "),
        ("[refit]\nmethod = 'prayer'", ": unknown refit.method 'prayer'; expected one of least-squares, bias, none"),
        ("[refit]\nmethod = 'least_squares'", "did you mean least-squares?"),
        (
            "[refit]\nrigde = 1",
            "refit.rigde: unknown key; expected one of method, alpha, ridge, inputs, solver; did you",
        ),
        ("[budget]\nratio = '20%'", "budget.ratio must be a number, found '20%'; did you mean 0.2?"),
        ("[budget]\nstructures = 3", "budget.structures must be written like A,B, found '3'"),
        ("[budget]\nstructures = [1, 2]", "budget.structures must be written like A,B, found '[1, 2]'"),
        ("[budget]\nlayers = 4", "budget.layers must be written like A:B, found '4'"),
        ("[gradient]\nepsilon = [1]", "gradient.epsilon must be written like 1e-3, found '[1]'"),
        ("[budget]\ntarget_params = true", "budget.target_params must be written like 5.4B, found 'True'"),
        ("[budget]\nlayers = 'one:two'", "budget.layers 'one:two' is not a range; expected A:B"),
        ("[budget]\ntarget_params = 'many'", "budget.target_params 'many' is not a number; expected 5.4B"),
        ("[budget]\ntarget_memory = '10'", "budget.target_memory '10' is not a size; expected 2GB"),
        ("[gradient]\nepsilon = 'small'", "gradient.epsilon 'small' is not a number"),
        ("[refit\n", "not a TOML file"),
    ],
)
def test_errors_of_a_file_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"recipe {path}: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "unknown recipe 'best'; expected one of ours, flap, llm-pruner, mini-llm, wanda-sp, or a path"),
        ("wanda", "did you mean wanda-sp?"),
        ("mini_llm", "did you mean mini-llm?"),
        ("nowhere.toml", "recipe nowhere.toml: cannot be read"),
        ("./nowhere", "recipe ./nowhere: cannot be read"),
        ("~no such user/mine.toml", "the recipe has no known home folder; give the whole path"),
    ],
)
def test_recipes_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(name)
    assert message in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "mine.toml")


# ------------------------------------------------------------------------------------------------------- options


def test_every_flag_and_alias_belongs_to_one_setting() -> None:
    flags = [name for _, one, described in options() for name in (described.flag or one.name, *described.aliases)]
    assert [name for name, count in Counter(flags).items() if count > 1] == []
    assert places().keys() == set(flags)
    assert PANELS.keys() == set(SECTIONS) | set(Recovery.sections())
    for section, one, _ in options():
        assert places()[flags_of(section, one.name).removeprefix("--").replace("-", "_")] == (section, one.name)


@pytest.mark.parametrize(
    ("former", "current", "value"),
    [
        ("restoration", "refit", "none"),
        ("inner", "refit_inputs", 0.25),
        ("difference", "estimator", "jvp"),
        ("allocation", "budget", "global"),
    ],
)
def test_former_names_of_options_set_the_same_setting(former: str, current: str, value: Any) -> None:
    former_recipe, former_flags = with_options(Recipe(), {former: value})
    recipe, flags = with_options(Recipe(), {current: value})
    assert former_recipe == recipe != Recipe()
    assert former_flags.keys() == flags.keys()
    assert list(former_flags.values()) == [f"--{former.replace('_', '-')}"]


def test_options_are_read_as_the_command_line_writes_them() -> None:
    texts = {
        "ratio": "0.2",
        "target_params": "5.4B",
        "target_memory": "10GB",
        "structures": "heads, hidden",
        "layers": "4:-2",
        "samples": "8",
        "epsilon": "auto",
        "alpha": "0.25",
        "refit": "bias",
    }
    values = {
        "ratio": 0.2,
        "target_params": 5.4e9,
        "target_memory": 10_000_000_000,
        "structures": ["heads", "hidden"],
        "layers": (4, -2),
        "samples": 8,
        "epsilon": "auto",
        "alpha": 0.25,
        "refit": "bias",
    }
    recipe, flags = with_options(Recipe(), texts)
    assert recipe == with_options(Recipe(), values)[0]
    assert recipe.data == Data(samples=8)
    assert recipe.budget == Budget(
        0.2, target_params=5.4e9, target_memory=10**10, structures=("heads", "hidden"), layers=(4, -2)
    )
    assert recipe.gradient == Estimation(epsilon=None)
    assert recipe.refit == Refit("bias", alpha=0.25)
    assert flags["gradient", "epsilon"] == "--epsilon"
    assert flags["refit", "method"] == "--refit"


@pytest.mark.parametrize(
    ("options_given", "message"),
    [
        ({"sparsity": 1}, "unknown option 'sparsity'; did you mean ratio?"),
        ({"keep_ratio": 0.8}, "did you mean ratio, which is the share to remove: 1 minus the share to keep?"),
        ({"seqlen": 1}, "unknown option 'seqlen'; did you mean seq_len?"),
        ({"ratio": "20%"}, "--ratio must be a number, found '20%'; did you mean 0.2?"),
        ({"ratio": "0,2"}, "--ratio must be a number, found '0,2'; did you mean 0.2?"),
        ({"dtype": "bfloat32"}, "unknown --dtype 'bfloat32'; expected one of float32, bfloat16, float16; did you mean"),
        ({"samples": "1e-3"}, "--samples must be a whole number, found '1e-3'"),
        ({"samples": "1e99"}, "--samples must be a whole number, found '1e99'"),
        ({"target_params": "1e999"}, "--target-params '1e999' is not a number"),
        ({"max_shard_size": "5 apples"}, "--max-shard-size '5 apples' is not a size; expected 2GB"),
        ({"max_shard_size": "0GB"}, "--max-shard-size '0GB' is no size of a file"),
        ({"ratoi": 1}, "unknown option 'ratoi'; did you mean ratio?"),
        ({"ratio": "x"}, "--ratio must be a number, found 'x'"),
        ({"samples": "2.5"}, "--samples must be a whole number, found '2.5'"),
        ({"criterion": "best"}, "unknown --criterion 'best'; expected one of obs, "),
        ({"restoration": "best"}, "unknown --restoration 'best'"),
        ({"memory": "2 XB"}, "--memory '2 XB' is not a size; expected 2GB, 500MB"),
        ({"layers": "²:3"}, "--layers '²:3' is not a range"),
    ],
)
def test_options_that_cannot_be_read(options_given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        with_options(Recipe(), options_given)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------------ spellings


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (
            (
                "200K",
                "200k",
                "200 K",
                "200_000",
                "200,000",
                "200000",
                "2e5",
                "0.2M",
                ".0002b".replace(".", "0."),
                "2E5",
            ),
            2e5,
        ),
        (("5.4B", "5.4 B", "5.4b", "5.4G", "5_400_000_000", "5,400,000,000", "5.4e9", "0.0054T"), 5.4e9),
    ],
)
def test_numbers_are_read_in_one_spelling(texts: tuple[str, ...], value: float) -> None:
    for text in texts:
        for option in ("target_params", "target_macs"):
            budget = with_options(Recipe(), {option: text})[0].budget
            assert getattr(budget, option) == pytest.approx(value, rel=1e-15), text


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (("2GB", "2 gb", "2g", "2G", "2_000MB", "2,000 MB", "2e9B", "2000000000B", "0.002TB", "2e6kB"), 2 * 10**9),
        (("1.5GiB", "1.5 gib", "1536MiB", "1536 mib"), 3 * 2**29),
        (("500MB", "500mb", "0.5GB", "500_000KB"), 500 * 10**6),
    ],
)
def test_sizes_are_read_in_one_spelling(texts: tuple[str, ...], value: int) -> None:
    for text in texts:
        recipe = with_options(Recipe(), {"target_memory": text, "memory": text, "max_shard_size": text})[0]
        assert recipe.budget.target_memory == recipe.gradient.memory == value, text
        check_shard_size(recipe.output.max_shard_size)
        assert read_bytes(recipe.output.max_shard_size) == value, text
    assert with_options(Recipe(), {"max_shard_size": value})[0].output == recipe.output


@pytest.mark.parametrize(("text", "value"), [("1024", 1024), ("1_024", 1024), ("1,024", 1024), ("1e3", 1000)])
def test_whole_numbers_are_read_in_one_spelling(text: str, value: int) -> None:
    assert with_options(Recipe(), {"samples": text})[0].data.samples == value
    assert with_options(Recipe(), {"seed": f"-{text}"})[0].data.seed == -value


@pytest.mark.parametrize(
    ("texts", "dtype"),
    [
        (("float32", "fp32", "FP32", "float", "torch.float32", " f32"), "float32"),
        (("bfloat16", "bf16", "BF16", "torch.bfloat16"), "bfloat16"),
        (("float16", "fp16", "half", "torch.float16", "Half"), "float16"),
    ],
)
def test_types_have_the_names_of_other_tools(texts: tuple[str, ...], dtype: str) -> None:
    for text in texts:
        assert with_options(Recipe(), {"dtype": text})[0].output.dtype == dtype
        assert with_assignments(Recipe(), [f"output.dtype={text}"])[0].output.dtype == dtype
        assert dtype_name(text) == dtype
    assert dtype_name("int8") == "int8"
    assert dtype_name(None) is None


@pytest.mark.parametrize(
    "text",
    ["heads, channels", "heads channels", "head,channel", "Heads + Channels", " heads ,channels,", "head; channel"],
)
def test_structures_may_be_singular_and_separated_otherwise(text: str) -> None:
    for value in (text, text.replace(",", " ").replace("+", " ").replace(";", " ").split()):
        assert with_options(Recipe(), {"structures": value})[0].budget.structures == ("heads", "channels")


@pytest.mark.parametrize(
    ("word", "meant"),
    [("ffn", "channels"), ("attn", "heads"), ("depth", "layers"), ("embedding", "hidden"), ("hiden", "hidden")],
)
def test_other_words_for_structures_are_answered_by_meaning(word: str, meant: str) -> None:
    recipe, given = with_options(Recipe(), {"structures": word, "ratio": 0.2})
    with pytest.raises(InputError, match=rf"unknown structure '{word}'; expected one of .*; did you mean {meant}\?"):
        used(recipe, given)


@pytest.mark.parametrize(("ratio", "near"), [(20, "0.2"), (20.5, "0.205"), (50, "0.5")])
def test_a_percentage_for_a_ratio_is_answered_with_the_ratio(ratio: float, near: str) -> None:
    recipe, given = with_options(Recipe(), {"ratio": ratio})
    with pytest.raises(
        InputError, match=rf"must lie between 0 and 1, both excluded, found {ratio:g}; did you mean {near}\?"
    ):
        used(recipe, given)


HUGE = "x" * 5000

# Settings that a run checks where it reads the text, the folder or the devices.
LATE = {
    ("data", "calibration"),
    ("data", "field"),
    ("evaluation", "text"),
    ("output", "checkpoint"),
    ("devices", "mesh"),
    ("devices", "hosts"),
}


@pytest.mark.parametrize("option", [keyword for keyword, place in places().items() if place not in LATE])
def test_sentences_hold_a_huge_value_shortened(option: str) -> None:
    with pytest.raises(InputError) as error:
        used(*with_options(Recipe(), {"ratio": 0.2, "criterion": "fms"} | {option: HUGE}))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "call",
    [
        lambda: with_options(Recipe(), {HUGE: 1}),
        lambda: with_assignments(Recipe(), [HUGE]),
        lambda: with_assignments(Recipe(), [f"refit.{HUGE}=1"]),
        lambda: load(HUGE),
        lambda: load(f"./{HUGE}"),
        lambda: load("a\0b.toml"),
    ],
)
def test_sentences_hold_a_huge_name_shortened(call: Any) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert len(str(error.value)) < 600


# --------------------------------------------------------------------------------------------------------- --set


def test_assignments_are_read_as_toml_or_as_the_option_is_written() -> None:
    assignments = [
        "refit.ridge=0.5",
        "refit.alpha = 1",
        "data.samples=8",
        "data.calibration=some folder/text.txt",
        'output.max_shard_size="1GB"',
        "budget.layers=4:-2",
        "budget.structures=heads,layers",
        "budget.target_macs=340G",
        "scoring.factors=magnitude,gradient",
        "scoring.criterion=fms",
        "gradient.epsilon=auto",
        "gradient.per_sequence=true",
        "devices.mesh=data=2,model=4",
    ]
    recipe, flags = with_assignments(Recipe(), assignments)
    assert recipe.refit == Refit(ridge=0.5, alpha=1.0)
    assert recipe.data == Data("some folder/text.txt", samples=8)
    assert recipe.output.max_shard_size == "1GB"
    assert recipe.budget == Budget(structures=("heads", "layers"), layers=(4, -2), target_macs=340e9)
    assert recipe.scoring == Scoring("fms", factors=("magnitude", "gradient"))
    assert recipe.gradient == Estimation(epsilon=None, per_sequence=True)
    assert recipe.devices.mesh == "data=2,model=4"
    assert flags["refit", "ridge"] == "--set refit.ridge"
    assert len(flags) == len(assignments)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ridge=0.1", "--set 'ridge=0.1' is not understood; expected SECTION.KEY=VALUE"),
        ("refit.ridge", "--set 'refit.ridge' is not understood"),
        ("fit.ridge=1", "with a section of data, budget, scoring, gradient, refit, "),
        ("refit.midge=1", "--set refit.midge: unknown key; expected one of method, alpha, "),
        ("refit.ridge=big", "--set refit.ridge 'big' is not a number"),
        ("data.samples=2.5", "--set data.samples must be a whole number, found '2.5'"),
        ("gradient.per_sequence=maybe", "--set gradient.per_sequence must be true or false, found 'maybe'"),
        ("refit.method=prayer", "unknown --set refit.method 'prayer'; expected one of least-squares"),
        ("budget.layers=x", "--set budget.layers 'x' is not a range"),
    ],
)
def test_assignments_that_cannot_be_read(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        with_assignments(Recipe(), [assignment])
    assert message in str(error.value)


def test_an_assignment_in_vain_is_refused_like_an_option() -> None:
    recipe, flags = with_assignments(load("wanda-sp"), ["budget.ratio=0.2", "refit.ridge=0.5"])
    with pytest.raises(InputError, match=r"--set refit\.ridge would do nothing in this run"):
        used(recipe, flags)


# ----------------------------------------------------------------------------------------------- back to TOML


def reloaded(recipe: Recipe, keys: dict[str, set[str]] | None = None) -> Recipe:
    """The recipe as it is read from the file that holds it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "written.toml")
        path.write_text(to_toml(recipe, keys), encoding="utf-8")
        return replace(load(path), name=recipe.name)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_recipe_is_read_back_from_its_toml(name: str) -> None:
    recipe = load(name)
    assert reloaded(recipe) == reloaded(recipe, ALL_KEYS) == recipe


# Characters that TOML can hold: all but surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.floats(allow_nan=False)
WHOLE = st.integers(-(2**63), 2**63 - 1)


def values_of(described: Option) -> st.SearchStrategy[Any]:
    """Values of an option's type. Most are out of its range, which `used` checks and a recipe does not."""
    if described.choices:
        return st.sampled_from(described.choices)
    by_spelling = {
        COUNT: st.none() | st.floats(0, 1e18),
        LAYERS: st.none() | st.tuples(st.integers(0, 999_999_999), st.integers(-999_999_999, 999_999_999)),
        STEP: st.none() | NUMBERS,
        SHARDS: st.integers(1, 999).map("{}MB".format),
        WORDS: st.lists(TEXTS, max_size=4).map(tuple),
    }
    if described.spelling is not None:
        return by_spelling.get(described.spelling, st.none() | st.integers(0, 2**60))
    return {float: NUMBERS, int: WHOLE, str: TEXTS, bool: st.booleans()}[described.kind]


RECORDED = {(section, one.name): values_of(described) for section, one, described in options() if described.recorded}


@given(TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=2), st.fixed_dictionaries({}, optional=RECORDED))
@settings(max_examples=60, deadline=None)
def test_all_settings_are_read_back_from_their_toml(
    summary: str, origin: dict[str, str], values: dict[tuple[str, str], Any]
) -> None:
    recipe = Recipe(summary=summary, origin=origin)
    for (section, key), value in values.items():
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    assert reloaded(recipe) == recipe
    assert reloaded(recipe, ALL_KEYS) == recipe


def test_paths_of_one_run_are_not_written() -> None:
    recipe, _ = with_options(Recipe(), {"checkpoint": "saved", "hosts": "auto", "calibration": "text.txt"})
    assert as_table(recipe, ALL_KEYS)["data"]["calibration"] == "text.txt"
    assert "checkpoint" not in to_toml(recipe, ALL_KEYS)
    assert "hosts" not in to_toml(recipe, ALL_KEYS)
