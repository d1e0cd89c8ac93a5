"""Rows of conversations: their forms, the chat template of the tokenizer, the text without one, and their errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from minillm_jax import demo
from minillm_jax.api import calibrate, describe, held_out
from minillm_jax.data.documents import check_source, read_blocks
from minillm_jax.data.text import read_tokens, tokenise
from minillm_jax.errors import InputError, InputWarning
from tests.helpers import edit_json, shared

TEMPLATE = (
    "{% for one in messages %}{% if one['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|end|>[{{ one['role'] }}] {{ one['content'] }} {% endfor %}"
)
MESSAGES = {"messages": [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A type."}]}
PAIR = {"prompt": "What is a list?", "response": "A type."}
ALPACA = {"instruction": "What is a list?", "input": "", "output": "A type."}
WITH_INPUT = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
RENDERED = "<|end|>[user] What is a list? <|end|>[assistant] A type. "


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the demo model with a chat template, which writes the beginning-of-sequence token itself."""
    folder = tmp_path_factory.mktemp("instruct") / "model"
    shutil.copytree(demo.FOLDER, folder)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def blocks(path: Path, **options: Any) -> list[str]:
    return [block.text for block in read_blocks(path, **options)]


@pytest.mark.parametrize(
    "row",
    [MESSAGES, PAIR, {"prompt": PAIR["prompt"], "completion": PAIR["response"]}, ALPACA, {**ALPACA, "input": None}],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_form_is_written_by_the_chat_template(tmp_path: Path, instruct: Path, row: Any, kind: str) -> None:
    """One conversation follows the other without a blank line, because the template marks their ends."""
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, **row}] * 2), path)
    else:
        path.write_text(json.dumps([row] * 2) if kind == "json" else f"{json.dumps(row)}\n" * 2)
    ids = read_tokens(path, instruct, 1024).ids
    np.testing.assert_array_equal(ids, tokenise(RENDERED * 2, instruct))
    assert (ids == 0).sum() == 4, "the token of the template is read as a token, and there is no second one"


def test_rows_of_python_and_an_input_are_written_too(instruct: Path) -> None:
    ids = held_out(describe(instruct), [MESSAGES, MESSAGES], 8).windows.ravel()
    np.testing.assert_array_equal(ids, tokenise(RENDERED * 2, instruct)[: ids.size])
    ids = held_out(describe(instruct), [WITH_INPUT], 8).windows.ravel()
    text = "<|end|>[user] Add the numbers.\n\n1, 2 <|end|>[assistant] 3 "
    np.testing.assert_array_equal(ids, tokenise(text, instruct)[: ids.size])


def test_without_a_chat_template_alpaca_has_its_published_prompt(tmp_path: Path) -> None:
    first, second = blocks(lines(tmp_path / "a.jsonl", ALPACA, WITH_INPUT))
    assert first == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is a list?\n\n### Response:\nA type."
    )
    assert second == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:\n3"
    )
    ids = read_tokens(tmp_path / "a.jsonl", demo.FOLDER, 1024).ids
    np.testing.assert_array_equal(ids, tokenise(f"{first}\n\n{second}", demo.FOLDER))


def test_without_a_chat_template_messages_are_lines_and_a_warning(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", PAIR, PAIR)
    assert blocks(path) == ["user: What is a list?\nassistant: A type."] * 2
    with pytest.warns(InputWarning, match="the tokenizer has no chat template") as found:
        ids = read_tokens(path, demo.FOLDER, 1024).ids
    assert len(found) == 1
    np.testing.assert_array_equal(ids, tokenise("\n\n".join(blocks(path)), demo.FOLDER))


def test_a_field_of_text_wins_and_a_named_field_decides(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {**PAIR, **MESSAGES, "text": "words", "dialogue": MESSAGES["messages"]})
    assert blocks(path) == ["words"]
    assert blocks(path, field="response") == ["A type."]
    assert blocks(path, field="dialogue") == ["user: What is a list?\nassistant: A type."]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"talk": MESSAGES["messages"]}]), tmp_path / "a.parquet")
    assert blocks(tmp_path / "a.parquet", field="talk") == ["user: What is a list?\nassistant: A type."]
    with pytest.raises(InputError, match="line 1: expected a field 'content', found 'prompt', 'response'"):
        blocks(path, field="content")


def test_empty_rows_are_left_out(tmp_path: Path) -> None:
    empty = [{"messages": []}, {"messages": None}]
    assert len(blocks(lines(tmp_path / "a.jsonl", *empty, MESSAGES))) == 1
    assert len(blocks(lines(tmp_path / "b.jsonl", {"prompt": None, "response": " "}, PAIR))) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": 1, "body": "a"}],
            "line 1: expected a field 'text', found 'id', 'body'; name one with --field, or give",
        ),
        ([{"instruction": "a"}], "line 1: expected a field 'text', found 'instruction'"),
        ([MESSAGES, {"text": "a"}], "line 2: expected 'messages' as in the rows before, found 'text'"),
        ([PAIR, MESSAGES], "line 2: expected 'prompt' and 'response' as in the rows before, found 'messages'"),
        ([PAIR, "a"], "line 2: expected an object with 'prompt' and 'response' as in the rows before, found a text"),
        ([{"text": "a"}, PAIR], "line 2: expected a field 'text', found 'prompt', 'response'"),
        ([{"messages": "a"}], "line 1: the field 'messages' holds a text, expected a list of messages"),
        ([{"messages": ["a"]}], "message 1: expected an object with 'role' and 'content', found a text"),
        ([{"messages": [{"from": "a", "value": "b"}]}], "message 1: expected .*'content', found 'from', 'value'"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "message 1: the content is a list, expected a text"),
        ([{"messages": [{"role": None, "content": "a"}]}], "message 1: the role is null, expected a text"),
        ([{"prompt": 3, "response": "a"}], "line 1: the field 'prompt' holds a number, expected a text"),
        ([{**ALPACA, "input": ["a"]}], "line 1: the field 'input' holds a list, expected a text"),
    ],
)
def test_rows_of_another_form_are_one_sentence(tmp_path: Path, rows: list[Any], message: str) -> None:
    """Found by the check before the model is read, too."""
    path = lines(tmp_path / "a.jsonl", *rows)
    for read in (blocks, check_source):
        with pytest.raises(InputError, match=message):
            read(path)


def test_the_row_of_a_parquet_file_is_named(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a", "b"], "response": ["c", "d"], "n": [1, 2]})
    pyarrow.parquet.write_table(table.set_column(1, "response", [[1, 2]]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: row 1: the field 'response' holds a number"):
        blocks(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.select(["prompt", "n"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: expected a field 'text', found 'prompt', 'n'; name one"):
        blocks(tmp_path / "a.parquet")


def test_a_conversation_that_the_template_refuses_is_one_sentence(tmp_path: Path, instruct: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be kind."}]}
    message = r"a.jsonl: line 2: the chat template of .*model refuses the conversation \(no system role\)"
    with pytest.raises(InputError, match=message):
        read_tokens(lines(tmp_path / "a.jsonl", MESSAGES, row), instruct, 1024)


def test_alpaca_calibrates_and_evaluates(instruct: Path) -> None:
    path = shared("data/alpaca/alpaca_5000.json")
    plain = calibrate(describe(demo.FOLDER), path, samples=8, length=64)
    chat = calibrate(describe(instruct), path, samples=8, length=64)
    assert plain.batches.windows.shape == chat.batches.windows.shape == (8, 64)
    assert (chat.batches.windows == 0).any(1).sum() > 2
    assert not (plain.batches.windows == 0).any()
    assert len(held_out(describe(instruct), path, 128).windows) > 1000


def test_the_seed_tasks_of_alpaca_have_other_fields() -> None:
    with pytest.raises(
        InputError, match="line 1: expected a field 'text', found 'id', 'name', 'instruction', 'instanc"
    ):
        blocks(shared("data/alpaca/seed_tasks.jsonl"))
    assert len(blocks(shared("data/alpaca/seed_tasks.jsonl"), field="instruction")) == 175
