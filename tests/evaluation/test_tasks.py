"""Tasks of lm-eval: each request is answered as by lm-eval's own model class, on the exported folder."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import minillm_jax as mj
from bench.local_tasks import write
from convert import modeling_pruned
from minillm_jax import demo
from minillm_jax.errors import InputError
from minillm_jax.evaluation import tasks
from minillm_jax.evaluation.harness import Harness, fitting
from minillm_jax.evaluation.tasks import Score, TaskSettings
from tests.helpers import torch_model

# Fields of a question -> answers; few tokens, some of these equal in both.
QUESTIONS = [
    {
        "query": "Question: what does the command print?\nAnswer:",
        "choices": ["a table", "nothing", "the file"],
        "gold": 0,
    },
    {"query": "The file is", "choices": ["written", "written once more", "a"], "gold": 1},
    {"query": "Each option has a", "choices": ["default", "name", "value and a default"], "gold": 2},
    {"query": "Question: which folder?\nAnswer:", "choices": ["the output", "none"], "gold": 0},
    {"query": "Numbers are printed as", "choices": ["text", "numbers"], "gold": 1},
    {"query": "It starts with", "choices": ["a letter", "b", "c", "d"], "gold": 3},
]
CONTEXTS = [
    {
        "context_options": ["The file was copied to the folder because the file", "The folder"],
        "continuation": "is new.",
        "gold": 0,
    },
    {"context_options": ["A", "The second word of the line"], "continuation": "comes before the third one.", "gold": 1},
]
PAIRS = [{"sentence_good": "The files are read.", "sentence_bad": "The files is read."}] * 3


def requests(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model -> its folder: a family, or a family and how it is pruned."""

    @cache
    def make(name: str) -> Path:
        family, _, form = name.partition(", ")
        path = tmp_path_factory.mktemp("models") / "model"
        if family == "llama":
            shutil.copytree(demo.FOLDER, path)
        else:
            torch_model(family, vocab_size=4096, max_position_embeddings=96).save_pretrained(path)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo.FOLDER / file, path)
        if not form:
            return path
        pruned = mj.prune(mj.load(path), ["the words of a text " * 400], 0.25, recipe="wanda-sp", samples=4, seq_len=32)
        mj.save(pruned, path.parent / form, format=form)
        return path.parent / form

    return make


@pytest.fixture(scope="module")
def theirs(folder: Callable[[str], Path]) -> Callable[[str], HFLM]:
    """Name of a model -> lm-eval's model class of transformers, with its folder."""
    modeling_pruned.register()
    return cache(lambda name: HFLM(str(folder(name)), device="cpu", dtype="float32", batch_size=3))


MODELS = ("llama", "opt", "bloom", "llama, stock", "llama, padded", "opt, per-layer", "bloom, per-layer")


@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_those_of_lm_eval(
    name: str, folder: Callable[[str], Path], theirs: Callable[[str], HFLM]
) -> None:
    long = "The command reads a file. " * 60
    pairs = [(q["query"], f" {choice}") for q in QUESTIONS for choice in q["choices"]]
    pairs += [("", "The file"), ("ends with spaces  ", "word"), (long, " more")]
    asked = requests("loglikelihood", *pairs)
    ours = Harness(mj.load(folder(name)))
    assert ours.max_length == theirs(name).max_length
    found, expected = ours.loglikelihood(asked), theirs(name).loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([log for log, _ in found], [log for log, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_whole_texts_and_generated_texts_are_those_of_lm_eval(
    name: str, folder: Callable[[str], Path], theirs: Callable[[str], HFLM]
) -> None:
    texts = requests("loglikelihood_rolling", ("The command reads a file. " * 40,), ("One line.",))
    ours = Harness(mj.load(folder(name)))
    expected = theirs(name).loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(texts), expected, rtol=1e-5)
    settings = ({"until": ["."], "max_gen_toks": 20}, {"until": "\n", "max_new_tokens": 9, "do_sample": False})
    prompts = ["The command", "A file that is", "Numbers"]
    asked = requests("generate_until", *((prompt, one) for one in settings for prompt in prompts))
    assert ours.generate_until(asked) == theirs(name).generate_until(asked, disable_tqdm=True)


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks with local files."""
    path = tmp_path_factory.mktemp("tasks")
    files = {}
    for name, rows in {"tiny_choices": QUESTIONS, "tiny_contexts": CONTEXTS, "tiny_pairs": PAIRS}.items():
        files[name] = path / f"{name}.jsonl"
        files[name].write_text("\n".join(json.dumps(row) for row in rows))
    write(path / "yaml", files)
    return path / "yaml"


TINY = ("tiny_choices", "tiny_contexts", "tiny_pairs")


def test_accuracies_are_those_of_lm_eval(
    folder: Callable[[str], Path], theirs: Callable[[str], HFLM], include: Path
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    told = []
    settings = TaskSettings(TINY, include_path=str(include))
    models = {name: mj.load(folder(name)) for name in ("llama", "llama, stock")}
    found = tasks.evaluate(models.items(), settings, lambda *step: told.append(step))
    assert list(found) == list(models)
    for name, of_model in found.items():
        manager = TaskManager(include_path=str(include), include_defaults=False)
        whole = simple_evaluate(theirs(name), tasks=list(TINY), task_manager=manager, log_samples=False)
        expected = whole.get("results", {})
        assert {score.task for score in of_model.scores} == set(TINY)
        for score in of_model.scores:
            assert score.value == pytest.approx(expected[score.task][f"{score.metric},none"])
            assert score.error == pytest.approx(expected[score.task][f"{score.metric}_stderr,none"])
            assert score.questions == {"tiny_choices": 6, "tiny_contexts": 2, "tiny_pairs": 3}[score.task]
        assert of_model.harness
    assert {stage for stage, _, _ in told} == {"tasks, llama", "tasks, llama, stock"}
    assert all(of == max(done for _, done, whole in told if whole == of) for _, _, of in told)


def test_examples_and_limits(folder: Callable[[str], Path], include: Path) -> None:
    model = [("llama", mj.load(folder("llama")))]
    few = tasks.evaluate(model, TaskSettings(("tiny_pairs",), limit=2, include_path=str(include)))["llama"]
    assert [score.questions for score in few.scores] == [2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tasks": ()}, "no task is given"),
        ({"tasks": ("piqaa",)}, "unknown task 'piqaa'"),
        ({"tasks": ("hellas",)}, r"unknown task 'hellas'; expected one of .*hellaswag"),
        ({"fewshot": -1}, "--fewshot -1: expected a whole number of at least 0"),
        ({"limit": 0}, "--limit 0: expected a whole number of at least 1"),
        ({"include_path": "/nowhere"}, "--include-path /nowhere: no such folder"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        tasks.check(TaskSettings(**{"tasks": ("piqa",)} | changes))


def test_questions_that_cannot_be_read_are_one_sentence(
    folder: Callable[[str], Path], include: Path, tmp_path: Path
) -> None:
    broken = json.loads((include / "tiny_pairs.yaml").read_text())
    broken["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "missing.jsonl")
    (tmp_path / "broken.yaml").write_text(json.dumps(broken | {"task": "broken"}))
    with pytest.raises(InputError, match=r"the questions of broken cannot be read .*--include-path"):
        tasks.evaluate([("m", mj.load(folder("llama")))], TaskSettings(("broken",), include_path=str(tmp_path)))


def test_names_of_groups_stand_for_their_tasks() -> None:
    assert tasks.expanded(("piqa", "llm-pruner", "mmlu")) == (
        "piqa", "boolq", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "mmlu",
    )  # fmt: skip


def test_the_mean_takes_the_metrics_of_published_tables() -> None:
    scores = [
        Score("piqa", "acc", 0.7, 0.03, 10), Score("piqa", "acc_norm", 0.8, 0.03, 10),
        Score("hellaswag", "acc", 0.4, 0.04, 10), Score("hellaswag", "acc_norm", 0.5, 0.04, 10),
    ]  # fmt: skip
    assert tasks.mean(scores, ["piqa", "hellaswag"]) == pytest.approx((0.6, 0.025))
    assert tasks.mean(scores, ["piqa", "boolq"]) is None


def test_contexts_are_cut_on_their_left() -> None:
    assert fitting([1, 2, 3, 4], [5, 6], 10) == ((1, 2, 3, 4), (5, 6))
    assert fitting([1, 2, 3, 4], [5, 6], 3) == ((3, 4), (5, 6))
    assert fitting([1, 2], [3, 4, 5, 6], 3) == ((3,), (4, 5, 6))
