"""Sequences to train on: which tokens count, token by token; padding, packing, splits, and their errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.reader import read_model
from minillm_jax import demo
from minillm_jax.data import tokenizing
from minillm_jax.data.examples import Examples, read_examples
from minillm_jax.data.text import Tokens, tokenise, tokenizer_of
from minillm_jax.data.windows import cut
from minillm_jax.errors import InputError, InputWarning
from minillm_jax.model.decoder import final_hidden
from minillm_jax.model.loss import token_losses
from tests.helpers import edit_json, hugging_face_folder, quickly, random_tokens, shared

END = 0
VOCABULARY = 1024
TOKENIZER = tokenizer_of(demo.FOLDER)

CHAT = (
    "{% for one in messages %}[{{ one['role'] }}]\n{{ one['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# The last response begins with an empty thought, as in Qwen3.
THINKING = CHAT.replace(
    "\n{{ one['content'] }}",
    "\n{% if loop.last and one['role'] == 'assistant' %}(think)\n\n{% endif %}{{ one['content'] }}",
)
# Only the last message is whole.
SHORTENING = CHAT.replace("{{ one['content'] }}", "{{ one['content'] if loop.last else one['content'][:3] }}")
CONDENSING = CHAT.replace("[{{ one['role'] }}]", "{% if messages|length > 2 %}Talk {% endif %}[{{ one['role'] }}]")

TURNS = (("system", "Be kind."), ("user", "Who?"), ("assistant", "I am."), ("user", "Why?"), ("assistant", "Because."))
MESSAGES = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
PAIR = {"prompt": "What is a list?", "response": "A type."}
ALPACA = {"instruction": "What is a list?", "input": "", "output": "A type."}
WITH_INPUT = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWhat is a list?\n\n### Response:\n"
)
DOCUMENTS = [demo.training_text()[at : at + 300].strip() for at in range(0, 3000, 300)]


def folder_with(path: Path, template: str) -> Path:
    """The tokenizer of the demo model with a chat template."""
    shutil.copytree(demo.FOLDER, path, dirs_exist_ok=True)
    edit_json(path / "tokenizer_config.json", chat_template=template)
    return path


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tokenizing.Tokenizer]:
    return tokenizer_of(folder_with(tmp_path_factory.mktemp("chat"), CHAT))


def read(data: Any, tokenizer: Any = TOKENIZER, length: int = 512, **options: Any) -> Examples:
    return read_examples(data, tokenizer, VOCABULARY, length, **options)


def text_of(ids: np.ndarray) -> str:
    call: Any = TOKENIZER().call
    return call.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def counted_texts(examples: Examples) -> list[str]:
    return [text_of(tokens[counted]) for tokens, counted in zip(examples.tokens, examples.counted, strict=True)]


def begun_by_token(path: Path) -> Callable[[], tokenizing.Tokenizer]:
    """The tokenizer of the demo model, which puts its token before every text."""
    from tokenizers import Tokenizer, processors

    shutil.copytree(demo.FOLDER, path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", END)])
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer_of(path)


# ----------------------------------------------------------------------------------------------------------- forms


def test_alpaca_counts_its_output_and_the_end() -> None:
    examples = read([ALPACA, WITH_INPUT])
    assert counted_texts(examples) == ["A type.<|end|>", "3<|end|>"]
    ids = tokenise(f"{PROMPT}A type.", demo.FOLDER)
    assert examples.tokens[0, : len(ids) + 1].tolist() == [*ids, END]
    prompt = len(tokenise(PROMPT, demo.FOLDER))
    assert examples.counted[0].nonzero()[0].tolist() == list(range(prompt, len(ids) + 1))
    assert examples.targets == examples.counted.sum()
    assert examples.source == "the given data"
    assert (examples.tokens.dtype, examples.counted.dtype) == (np.int32, bool)


def test_pairs_and_messages_without_a_template_are_lines() -> None:
    """The space behind the colon and the line feed belong to the response; the mark of the end does where one ends."""
    rows = [MESSAGES, {"messages": [*MESSAGES["messages"], {"role": "user", "content": "Oh."}]}]
    with pytest.warns(InputWarning, match="the tokenizer has no chat template"):
        examples = read(rows)
    assert counted_texts(examples) == [" I am.\n Because.<|end|>", " I am.\n Because.\n"]
    assert text_of(examples.tokens[1]).startswith("system: Be kind.\nuser: Who?\nassistant: I am.\nuser: Why?\n")
    for row in (PAIR, {"prompt": PAIR["prompt"], "completion": PAIR["response"]}):
        with pytest.warns(InputWarning, match="the tokenizer has no chat template"):
            assert counted_texts(read([row])) == [" A type.<|end|>"]


def test_all_counts_everything_but_the_first_token() -> None:
    examples = read([ALPACA, WITH_INPUT], loss_on="all")
    ends = [row.nonzero()[0].max() for row in examples.counted]
    assert [row[1 : end + 1].all() for row, end in zip(examples.counted, ends, strict=True)] == [True, True]
    assert not examples.counted[:, 0].any()
    assert examples.tokens[0, ends[0]] == END
    assert not examples.counted[0, ends[0] + 1 :].any()


def test_a_chat_template_marks_every_response_and_its_end(chat: Callable[[], tokenizing.Tokenizer]) -> None:
    examples = read([MESSAGES, PAIR, ALPACA][:1], chat)
    assert counted_texts(examples) == ["I am.<|end|>Because.<|end|>"]
    whole = "".join(f"[{role}]\n{content}<|end|>\n" for role, content in TURNS)
    ids = tokenise(whole, demo.FOLDER)
    np.testing.assert_array_equal(examples.tokens[0, : len(ids)], ids)
    assert not examples.counted[0, len(ids) :].any(), "the template has written the end"
    for row in (PAIR, ALPACA):
        assert counted_texts(read([row], chat)) == ["A type.<|end|>"]
    everything = text_of(read([PAIR], chat, loss_on="all").tokens[0])
    assert everything.startswith("[user]\nWhat is a list?<|end|>\n[assistant]\nA type.<|end|>\n")


def test_a_response_that_comes_first_or_twice_is_marked(chat: Callable[[], tokenizing.Tokenizer]) -> None:
    told = [{"role": "assistant", "content": word} for word in ("Hello.", "Hi.")]
    examples = read([{"messages": told}], chat)
    assert counted_texts(examples) == ["Hello.<|end|>Hi.<|end|>"]


def test_white_space_closes_a_response_without_a_mark(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, CHAT.replace("<|end|>", ""))
    assert counted_texts(read([MESSAGES], tokenizer_of(folder))) == ["I am.\nBecause.\n"]


def test_the_last_response_may_have_more_words(tmp_path: Path) -> None:
    """A one-letter response must not be found inside the mark."""
    folder = folder_with(tmp_path, THINKING)
    assert counted_texts(read([MESSAGES], tokenizer_of(folder))) == ["I am.<|end|>(think)\n\nBecause.<|end|>"]
    row = {"messages": [dict(one) for one in MESSAGES["messages"]]}
    row["messages"][2]["content"] = "n"
    assert counted_texts(read([row], tokenizer_of(folder))) == ["n<|end|>(think)\n\nBecause.<|end|>"]


@pytest.mark.parametrize(("template", "number"), [(SHORTENING, 3), (CONDENSING, 3)])
def test_a_template_that_rewrites_earlier_messages_is_one_sentence(tmp_path: Path, template: str, number: int) -> None:
    tokenizer = tokenizer_of(folder_with(tmp_path / "model", template))
    message = (
        rf"text 0 of the given data: the chat template of .*model writes .* up to message {number} .* --loss-on all"
    )
    with pytest.raises(InputError, match=message):
        read([MESSAGES], tokenizer)
    assert read([MESSAGES], tokenizer, loss_on="all").targets > 20


def test_the_template_of_alpaca_may_be_forced(chat: Callable[[], tokenizing.Tokenizer]) -> None:
    forced, plain = read([ALPACA, WITH_INPUT], chat, template="alpaca"), read([ALPACA, WITH_INPUT])
    assert forced.fingerprint() == plain.fingerprint()
    assert forced.fingerprint() != read([ALPACA, WITH_INPUT], chat).fingerprint()
    for data in ([PAIR], [MESSAGES]):
        with pytest.raises(
            InputError, match=r"text 0 of .*--template alpaca is for rows with 'instruction' and 'output'"
        ):
            read(data, template="alpaca")
    for data, found in ((DOCUMENTS, "text"), (np.arange(9), "token ids")):
        with pytest.raises(InputError, match=f"--template alpaca is for rows .*, found {found}; use --template auto"):
            read(data, template="alpaca")


def test_the_date_in_a_conversation_is_the_same_every_day(tmp_path: Path) -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = tokenizer_of(folder_with(tmp_path, dated + "{{ date_string }} " + CHAT))
    assert text_of(read([PAIR], tokenizer).tokens[0]).startswith("26 Jul 2024 [user]")


def test_a_tokenizer_without_offsets_gets_prompt_and_response_apart() -> None:
    slow = TOKENIZER()._replace(offsets=False)
    examples = read([ALPACA], lambda: slow)
    assert counted_texts(examples) == ["A type.<|end|>"]
    ids = [*tokenise(PROMPT, demo.FOLDER), *tokenise("A type.", demo.FOLDER), END]
    assert examples.tokens[0, : len(ids)].tolist() == ids


def test_a_token_across_the_border_belongs_to_the_prompt(tmp_path: Path) -> None:
    """The last line feed of a prompt and the first of a response are one token."""
    examples = read([{"prompt": "Go.", "response": "\n\nOn."}], tokenizer_of(folder_with(tmp_path, CHAT)))
    assert counted_texts(examples) == ["\nOn.<|end|>"]


# ------------------------------------------------------------------------------------------------ first token, ends


def test_examples_begin_with_the_token_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = begun_by_token(tmp_path)
    tokens, plain = read([ALPACA], tokenizer).tokens[0], read([ALPACA]).tokens[0]
    assert tokens[0] == END
    assert tokens[1:60].tolist() == plain[:59].tolist()
    assert not read([ALPACA], tokenizer).counted[0, 0]
    np.testing.assert_array_equal(read([ALPACA], tokenizer, bos="no").tokens[0], plain)
    np.testing.assert_array_equal(read([ALPACA], bos="yes").tokens[0], tokens)


def test_a_template_that_writes_the_token_gets_no_second_one(tmp_path: Path) -> None:
    begun_by_token(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template="<|end|>" + CHAT)
    tokens = read([PAIR], tokenizer_of(tmp_path)).tokens[0]
    assert tokens[0] == END != tokens[1]


def test_a_text_that_ends_with_the_token_gets_no_second_one() -> None:
    examples = read(["Once upon a time.<|end|>"], packing="padded")
    assert (examples.tokens[0][examples.counted[0]] == END).sum() == 1


def test_long_examples_are_cut_off_and_those_without_a_response_are_left_out() -> None:
    rows = [{**ALPACA, "output": "word " * 400}, {**ALPACA, "instruction": "word " * 200}, ALPACA]
    prompt = len(tokenise(PROMPT, demo.FOLDER))
    length = prompt + 9
    with pytest.warns(
        InputWarning, match=r"1 of 3 examples are left out, .* first \d+ tokens; use a longer --seq-len$"
    ):
        examples = read(rows, length=length)
    assert examples.tokens.shape == (2, length)
    assert examples.counted[0, prompt:].all()
    assert END not in examples.tokens[0], "a response that was cut off has no end"
    assert counted_texts(examples)[1] == "A type.<|end|>"
    with pytest.raises(
        InputError, match="3 of 3 examples are left out, because the loss would count none of their first"
    ):
        read(rows, length=prompt)


def test_conversations_without_a_response_are_left_out(chat: Callable[[], tokenizing.Tokenizer]) -> None:
    asked = {"messages": MESSAGES["messages"][:2]}
    with pytest.warns(InputWarning, match="1 of 2 examples are left out, .* none of their tokens: 1 have no response"):
        assert read([asked, MESSAGES], chat).count == 1
    long = {"messages": [{"role": "user", "content": "word " * 90}, MESSAGES["messages"][2]]}
    with pytest.warns(InputWarning, match=r"2 of 3 .* their first 80 tokens; use a longer --seq-len \(1 have no resp"):
        assert read([asked, MESSAGES, long], chat, length=80).count == 1
    with pytest.warns(InputWarning, match="1 of 2 examples are left out, .* none of their tokens: 1 have"):
        read([asked, MESSAGES], chat, length=16, packing="packed")
    with pytest.raises(InputError, match=r"1 of 1 examples are left out, .* give rows with messages of the assistant"):
        read([asked], chat)


# --------------------------------------------------------------------------------------------- padding and packing


def test_rows_are_padded_up_to_a_multiple_of_eight() -> None:
    examples = read([ALPACA, WITH_INPUT, ALPACA])
    longest = examples.counted[1].nonzero()[0].max() + 1
    assert examples.length % 8 == 0
    assert 0 <= examples.length - longest < 8
    assert (examples.tokens[1, longest:] == END).all()
    assert read([ALPACA, WITH_INPUT], length=int(longest)).length == longest
    without = TOKENIZER()._replace(eos=None)
    assert read(["Once upon"], lambda: without, packing="padded").tokens[0, -1] == 0


@pytest.mark.parametrize("family", quickly(["llama", "opt", "bloom"], ("llama", "opt")))
def test_padding_changes_no_loss(tmp_path: Path, family: str) -> None:
    """The sum of a padded batch is that of its sequences by themselves, whatever ids the padding has."""
    decoder = read_model(hugging_face_folder(tmp_path, family, vocab_size=VOCABULARY)).decoder
    examples = read(
        ["Once upon a time, there was a dog.", "He was a big dog.", "One day he saw a cat. The cat ran away."],
        packing="padded",
    )

    @jax.jit
    def losses(tokens: jax.Array) -> jax.Array:
        return token_losses(decoder, final_hidden(decoder, tokens), tokens)

    batch = np.asarray(losses(examples.tokens), np.float64)
    counted = examples.counted[:, 1:]
    ends = [row.nonzero()[0].max() + 1 for row in examples.counted]
    assert len(set(ends)) == 3
    alone = [np.asarray(losses(row[None, :end]), np.float64) for row, end in zip(examples.tokens, ends, strict=True)]
    np.testing.assert_allclose((batch * counted).sum(), sum(one.sum() for one in alone), rtol=1e-6)
    for row, one in enumerate(alone):
        np.testing.assert_allclose(batch[row, : ends[row] - 1], one[0], rtol=2e-5, atol=1e-5)
    places = np.arange(examples.length)[None] >= np.array(ends)[:, None]
    others = np.where(places, random_tokens(VOCABULARY, *examples.tokens.shape), examples.tokens)
    assert (others != examples.tokens).any()
    np.testing.assert_array_equal(np.asarray(losses(others))[counted], np.asarray(losses(examples.tokens))[counted])


def test_conversations_are_packed_with_their_marks() -> None:
    rows = [ALPACA, WITH_INPUT, ALPACA]
    ids, marks = [], []
    for row in rows:
        one = read([row])
        end = one.counted[0].nonzero()[0].max() + 1
        ids += one.tokens[0, :end].tolist()
        marks += one.counted[0, :end].tolist()
    examples = read(rows, length=20, packing="packed")
    count = len(ids) // 20
    tokens, counted = np.array(ids[: count * 20]).reshape(count, 20), np.array(marks[: count * 20]).reshape(count, 20)
    counted[:, 0] = False
    some = counted.any(axis=1)
    assert 0 < some.sum() < count
    np.testing.assert_array_equal(examples.tokens, tokens[some])
    np.testing.assert_array_equal(examples.counted, counted[some])
    with pytest.raises(InputError, match="tokens are less than one window of 512"):
        read(rows, packing="packed")


class Letters:
    """A tokenizer whose tokens are letters, each with an id that comes only once: odd for an X, even for another."""

    def __init__(self) -> None:
        self.encoded: list[int] = []

    def __call__(self, text: str, add_special_tokens: bool, return_offsets_mapping: bool = False) -> dict[str, Any]:
        ids = [2 * (1 + number) + (letter == "X") for number, letter in enumerate(text, len(self.encoded))]
        if add_special_tokens or not return_offsets_mapping:
            return {"input_ids": [0] * add_special_tokens + ids}
        self.encoded += [0, *ids, 1]
        return {"input_ids": ids, "offset_mapping": [(place, place + 1) for place in range(len(text))]}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=4, max_size=9),
    st.integers(2, 90),
    st.sampled_from(["llama", "gemma"]),
)
def test_every_counted_token_is_packed_once(sizes: list[tuple[int, int]], length: int, family: str) -> None:
    """But for the partial window at the end, and, where windows begin without a token, for the first of each."""
    letters = Letters()
    tokenizer = tokenizing.Tokenizer(Path("made"), letters, 0, True, 1)
    rows = [{"instruction": "q" * asked, "output": "X" * told} for asked, told in sizes]
    rows.append({"instruction": "q", "output": "X" * 200})
    examples = read_examples(rows, lambda: tokenizer, 10**6, length, packing="packed", family=family)
    counted = examples.tokens[examples.counted]
    answers = counted[counted > 1]
    assert (answers % 2 == 1).all(), "no token of a prompt counts"
    assert len(set(answers.tolist())) == len(answers)
    missing = {one for one in letters.encoded if one % 2 and one > 1} - set(answers.tolist())
    step = length - (family == "gemma")
    whole = (len(letters.encoded) - (family == "gemma")) // step * step
    places = [place for place, one in enumerate(letters.encoded) if one in missing and place < whole]
    assert family != "gemma" or not places
    assert all(place % length == 0 for place in places)
    ends = sum(
        one == 1 and (family == "gemma" or place % length > 0) for place, one in enumerate(letters.encoded[:whole])
    )
    assert (counted == 1).sum() - ends in ((0, 1) if family == "gemma" else (0,))
    assert not examples.counted[:, 0].any()
    assert family != "gemma" or (examples.tokens[:, 0] == 0).all()
    assert (np.diff(answers) > 0).all(), "in the order of the rows"


# ------------------------------------------------------------------------------------------------ text and token ids


def test_documents_are_packed_as_for_calibration(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    ids = tokenise("\n\n".join(DOCUMENTS), demo.FOLDER)
    expected = cut(Tokens(ids, "here", 1), 32)
    for data in (DOCUMENTS, [{"text": text} for text in DOCUMENTS], tmp_path / "text.txt"):
        examples = read(data, length=32)
        np.testing.assert_array_equal(examples.tokens, expected)
        assert examples.counted[:, 1:].all()
        assert not examples.counted[:, 0].any()
    assert examples.source == str(tmp_path / "text.txt")
    assert examples.targets == examples.count * 31
    assert read(DOCUMENTS, length=32, packing="packed", loss_on="all").fingerprint() == examples.fingerprint()
    body = [{"body": text} for text in DOCUMENTS]
    assert read(body, length=32, field="body").fingerprint() == examples.fingerprint()


def test_packed_documents_have_the_token_as_in_calibration(tmp_path: Path) -> None:
    tokenizer = begun_by_token(tmp_path)
    whole = np.concatenate([np.append(END, tokenise(text, demo.FOLDER)) for text in DOCUMENTS])[1:]
    np.testing.assert_array_equal(read(DOCUMENTS, tokenizer, 32).tokens, cut(Tokens(whole, "here", 1), 32))
    begun = read(DOCUMENTS, tokenizer, 32, family="gemma2")
    np.testing.assert_array_equal(begun.tokens, cut(Tokens(whole, "here", 1), 32, END))
    assert (begun.tokens[:, 0] == END).all()


def test_documents_may_be_padded(tmp_path: Path) -> None:
    examples = read(["Once upon a time. " * 9, " ", "One day."], length=16, packing="padded")
    assert examples.tokens.shape == (2, 16)
    np.testing.assert_array_equal(examples.tokens[0], tokenise("Once upon a time. " * 9, demo.FOLDER)[:16])
    ids = tokenise("One day.", demo.FOLDER)
    assert examples.tokens[1, : len(ids) + 1].tolist() == [*ids, END]
    assert examples.counted[1].tolist() == [1 <= place <= len(ids) for place in range(16)]
    (tmp_path / "text.txt").write_text("Once upon a time. " * 9)
    one = read(tmp_path / "text.txt", length=16, packing="padded")
    np.testing.assert_array_equal(one.tokens, examples.tokens[:1])


def test_token_ids_are_cut_into_windows(tmp_path: Path) -> None:
    ids = random_tokens(VOCABULARY, 330)
    np.save(tmp_path / "ids.npy", ids)
    for data in (ids, tmp_path / "ids.npy", [ids[:7].tolist(), ids[7:].tolist()]):
        examples = read_examples(data, lambda: pytest.fail("no tokenizer is needed"), VOCABULARY, 32)
        np.testing.assert_array_equal(examples.tokens, ids[:320].reshape(10, 32))
        assert examples.targets == 310
    with pytest.raises(InputError, match=r"token id .* lies outside the model's vocabulary of 9"):
        read_examples(ids, TOKENIZER, 9, 32)
    with pytest.raises(InputError, match="token ids show no ends of documents to pad; use --packing packed"):
        read(ids, packing="padded")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DOCUMENTS, {"loss_on": "response"}, "--loss-on response is for conversations, found text; use --loss-on all"),
        (np.arange(9), {"loss_on": "response"}, "for conversations, found token ids; use --loss-on all, or give rows"),
        (np.arange(9), {"bos": "yes"}, "--bos is for text; put the token into the array instead"),
        (DOCUMENTS, {"loss_on": "prompt"}, "unknown choice of tokens --loss-on 'prompt'; expected one of auto, resp"),
        (DOCUMENTS, {"template": "chatml"}, "unknown template --template 'chatml'; expected one of auto, alpaca"),
        (DOCUMENTS, {"packing": "padding"}, "unknown packing .*'padding'; .*did you mean padded"),
        (DOCUMENTS, {"bos": "text"}, "unknown place of the token --bos 'text'; expected one of auto, yes, no"),
        (DOCUMENTS, {"length": 1}, "a window of 1 tokens has nothing to predict"),
        (DOCUMENTS[:1], {"length": 500}, "tokens are less than one window of 500"),
        ([], {}, "the given data: there is no text in it"),
        ([" ", "\n"], {}, "the given data: there is no text in it"),
        ([" ", "\n"], {"packing": "padded"}, "the given data: there is no text in it"),
        ([{"messages": []}], {}, "the given data: there is no text in it"),
        ([{"prompt": None, "response": " "}], {}, "the given data: there is no text in it"),
        ([{"body": "a"}], {}, "text 0 of the given data: expected a field 'text', found 'body'; name one with --field"),
        ([ALPACA, PAIR], {}, "text 1 of .*: expected 'instruction' and 'output' as in the rows before, found 'prompt'"),
        ("nowhere.json", {}, "nowhere.json: no such file"),
    ],
)
def test_data_that_cannot_be_used_are_one_sentence(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(data, **options)


def test_a_blank_file_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n" * 99)
    for packing in ("padded", "packed"):
        with pytest.raises(InputError, match=r"blank\.txt: there is no text in it"):
            read(tmp_path / "blank.txt", packing=packing)


def test_a_token_outside_the_vocabulary_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"token id .* lies outside the model's vocabulary of 50"):
        read_examples([ALPACA], TOKENIZER, 50, 256)


def test_an_empty_row_is_left_out() -> None:
    assert read([ALPACA, {"instruction": "", "output": ""}, WITH_INPUT]).count == 2


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = SimpleNamespace(load_dataset=lambda *_, **__: iter([ALPACA, WITH_INPUT]))
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    examples = read("owner/name")
    assert examples.source == "owner/name"
    assert examples.fingerprint() == read([ALPACA, WITH_INPUT]).fingerprint()


# -------------------------------------------------------------------------------------------------------- the object


def numbered(count: int) -> Examples:
    tokens = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
    return Examples(tokens, np.broadcast_to(np.arange(4) > 0, tokens.shape), "made")


def test_a_split_keeps_the_order_and_every_sequence() -> None:
    examples = numbered(20)
    training, validation = examples.split(5, 3)
    assert (training.count, validation.count) == (15, 5)
    starts = [part.tokens[:, 0].tolist() for part in (training, validation)]
    assert starts[0] == sorted(starts[0])
    assert sorted(starts[0] + starts[1]) == examples.tokens[:, 0].tolist()
    assert validation.fingerprint() == examples.split(5, 3)[1].fingerprint()
    assert validation.fingerprint() != examples.split(5, 4)[1].fingerprint()
    assert examples.split(0, 0)[0].fingerprint() == examples.fingerprint()
    assert examples.split(0, 0)[1].count == 0


@pytest.mark.parametrize(
    ("held_out", "seed", "message"),
    [
        (-1, 0, "must be at least 0, found -1"),
        (3, 0, "made: 4 sequences without 3 for validation leave fewer than 2 for training"),
        (5, 0, "leave fewer than 2 for training"),
        (1, -1, "--seed must lie between 0"),
    ],
)
def test_a_split_that_is_not_possible_is_one_sentence(held_out: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        numbered(4).split(held_out, seed)


def test_sequences_are_taken_by_number() -> None:
    tokens, counted = numbered(5).take(np.array([4, 0, 4]))
    assert tokens[:, 0].tolist() == [16, 0, 16]
    assert counted.tolist() == [[False, True, True, True]] * 3


def test_the_fingerprint_covers_tokens_marks_and_shape() -> None:
    examples = numbered(4)
    marks = examples.counted.copy()
    marks[1, 2] = False
    tokens = examples.tokens + np.eye(4, dtype=np.int32)
    others = [
        Examples(examples.tokens, marks, "made"),
        Examples(tokens, examples.counted, "made"),
        Examples(examples.tokens.reshape(2, 8), examples.counted.reshape(2, 8), "made"),
    ]
    assert len({one.fingerprint() for one in (examples, *others)}) == 4
    assert Examples(examples.tokens.copy(), examples.counted, "elsewhere").fingerprint() == examples.fingerprint()


# --------------------------------------------------------------------------------------------------------- real data


def test_the_responses_of_alpaca_are_marked(tmp_path: Path) -> None:
    rows = json.loads(shared("data/alpaca/alpaca_5000.json").read_text())[:200]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    examples = read(tmp_path / "alpaca.json", length=2048)
    assert examples.count == len([row for row in rows if row["instruction"] + row["output"]])
    assert counted_texts(examples) == [f"{row['output']}<|end|>" for row in rows]
    packed = read(tmp_path / "alpaca.json", length=256, packing="packed")
    assert 0.98 < packed.targets / examples.targets <= 1


@pytest.mark.parametrize("name", ["stories260K", "opt-3m", "bloom-3m"])
def test_real_tokenizers_mark_the_responses_of_alpaca(name: str, tmp_path: Path) -> None:
    folder = shared(f"models/{name}")
    rows = json.loads(shared("data/alpaca/alpaca_5000.json").read_text())[:20]
    tokenizer = tokenizer_of(folder)
    examples = read_examples(rows, tokenizer, 60_000, 2048)
    call: Any = tokenizer().call
    for row, tokens, counted in zip(rows, examples.tokens, examples.counted, strict=True):
        assert call.decode(tokens[counted].tolist()).strip() == f"{row['output']}{call.eos_token}"
    assert (examples.tokens[:, 0] == call.bos_token_id).all() == (name == "stories260K")
