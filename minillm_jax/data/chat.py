"""Rows of conversations: which fields hold one, its messages, and its text by the chat template of a tokenizer.

Three forms are read: `messages`, a list of objects with a role and a content; `prompt` with `response` or `completion`;
and `instruction`, `input` and `output`, the fields of Stanford Alpaca.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from minillm_jax.data.rows import kind_of_value, named, text_of
from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.errors import InputError, cause, shortened, warn

# The form of a row that holds its text in a field of its own.
TEXT = "text"

_MESSAGES, _PAIR, _ALPACA = "messages", "pair", "alpaca"

# The role whose messages are responses.
ASSISTANT = "assistant"

# The date that the templates of Llama 3 write, so that the text of a conversation does not depend on the day. It is the
# one that Llama 3.1 writes where it is told none.
TODAY = "26 Jul 2024"

# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), as LLM-Pruner's recovery writes them too.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class Form(NamedTuple):
    """The fields in which all rows of a source hold their text.

    Attributes:
      kind: `text`, `messages`, `pair` or `alpaca`.
      fields: the fields that every row has.
      optional: a field that a row may lack.
    """

    kind: str
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()


_FORMS = (
    Form(_MESSAGES, ("messages",)),
    Form(_PAIR, ("prompt", "response")),
    Form(_PAIR, ("prompt", "completion")),
    Form(_ALPACA, ("instruction", "output"), ("input",)),
)


# First character of a response, and the one after its last.
Span = tuple[int, int]


class Conversation(NamedTuple):
    """The messages of one row.

    Attributes:
      messages: role and content of each.
      plain: their text where there is no chat template.
      responses: the responses in `plain`, see `Written`.
      published: whether `plain` is a published prompt.
    """

    messages: tuple[tuple[str, str], ...]
    plain: str
    responses: tuple[Span, ...]
    published: bool


class Written(NamedTuple):
    """The text of a row.

    Attributes:
      text: the text.
      by_template: whether a chat template wrote it, with its own marks of the beginning and the end.
      responses: characters of the assistant's messages, each with the mark that closes it, in their order; empty where
        the writer was not asked for them; None where the row is no conversation.
    """

    text: str
    by_template: bool
    responses: tuple[Span, ...] | None = None


# Conversation, and where it stands for errors -> its text.
Writer = Callable[[Conversation, str], Written]


def form_of_fields(names: Collection[str], field: str, chosen: bool) -> Form:
    """The form of rows with these fields; a form of text where nothing fits.

    Args:
      names: the fields.
      field: the field that holds the text of a row.
      chosen: whether the user has named that field, so that no other form counts.
    """
    chat = next((form for form in _FORMS if all(name in names for name in form.fields)), None)
    return Form(TEXT, (field,)) if chat is None or chosen or field in names else chat


def form_of(row: Any, field: str, chosen: bool) -> Form:
    """The form of a row, as in `form_of_fields`; a field with a list of messages is one of messages."""
    if not isinstance(row, Mapping):
        return Form(TEXT, (field,))
    value = row.get(field)
    if isinstance(value, Sequence) and not isinstance(value, str) and value and _is_message(value[0]):
        return Form(_MESSAGES, (field,))
    return form_of_fields(row.keys(), field, chosen)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def read(row: Any, form: Form, where: str) -> Conversation | None:
    """The conversation of a row; None where the row is empty.

    Args:
      row: an object with the fields of the form.
      form: of the first row of the source.
      where: file and line, for errors.

    Raises:
      InputError: the row has other fields than the rows before, or there is something else in them.
    """
    names = " and ".join(repr(name) for name in form.fields)
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object with {names} as in the rows before, found {kind_of_value(row)}")
    if not all(name in row for name in form.fields):
        raise InputError(f"{where}: expected {names} as in the rows before, found {named(row)}")
    if form.kind == _MESSAGES:
        return _of_messages(row[form.fields[0]], form.fields[0], where)
    first, second = (text_of(row, name, where) for name in form.fields)
    if not (first + second).strip():
        return None
    if form.kind == _PAIR:
        return _plainly((("user", first), (ASSISTANT, second)))
    more = text_of({"input": None, **row}, "input", where).strip()
    prompt = (_WITH_INPUT if more else _WITHOUT_INPUT).format(instruction=first, input=more)
    question = f"{first}\n\n{more}" if more else first
    text = prompt + second
    return Conversation((("user", question), (ASSISTANT, second)), text, ((len(prompt), len(text)),), published=True)


def _of_messages(value: Any, field: str, where: str) -> Conversation | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} holds {kind_of_value(value)}, expected a list of messages")
    for number, message in enumerate(value, 1):
        if not _is_message(message):
            found = named(message) if isinstance(message, Mapping) else kind_of_value(message)
            raise InputError(f"{where}: message {number}: expected an object with 'role' and 'content', found {found}")
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                found = kind_of_value(message[key])
                raise InputError(f"{where}: message {number}: the {key} is {found}, expected a text")
    messages = tuple((message["role"], message["content"]) for message in value)
    return _plainly(messages) if messages else None


def _plainly(messages: tuple[tuple[str, str], ...]) -> Conversation:
    """A conversation with a line for each message.

    A response begins with the space behind the colon, which many tokenizers join to the next word, and ends with its
    line feed.
    """
    text, responses = "", []
    for number, (role, content) in enumerate(messages, 1):
        line = f"{role}: {content}" + ("\n" if number < len(messages) else "")
        if role == ASSISTANT:
            responses.append((len(text) + len(f"{role}:"), len(text) + len(line)))
        text += line
    return Conversation(messages, text, tuple(responses), published=False)


# --------------------------------------------------------------------------------------------------------- writing


def plainly(conversation: Conversation, _where: str) -> Written:
    """The text of a conversation without a chat template: Alpaca's prompt, or a line `role: content` for a message."""
    return Written(conversation.plain, by_template=False, responses=conversation.responses)


def by_alpaca(conversation: Conversation, where: str) -> Written:
    """The text of a row with instruction and output by Alpaca's prompt.

    Raises:
      InputError: the row has another form.
    """
    if not conversation.published:
        raise InputError(f"{where}: {ALPACA_ROWS}, found another form; use --template auto")
    return plainly(conversation, where)


# For errors.
ALPACA_ROWS = "--template alpaca is for rows with 'instruction' and 'output'"


class Templated:
    """Writes conversations by the chat template of a tokenizer; plainly, with a warning, where it has none.

    Args:
      tokenizer: loads the tokenizer; called for every conversation.
      responses: whether to find the responses in the text that a chat template writes.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], responses: bool = False) -> None:
        self._tokenizer, self._responses, self._warned = tokenizer, responses, False

    def __call__(self, conversation: Conversation, where: str) -> Written:
        """The text of a conversation.

        Raises:
          InputError: the template refuses the conversation, its responses cannot be found, or jinja2 is not installed.
        """
        loaded = self._tokenizer()
        if not getattr(loaded.call, "chat_template", None):
            if not (conversation.published or self._warned):
                self._warned = True
                warn(
                    f"{loaded.folder}: the tokenizer has no chat template; every message is read as a line "
                    "'role: content'"
                )
            return plainly(conversation, where)
        messages = [{"role": role, "content": content} for role, content in conversation.messages]
        text = _rendered(loaded, messages, where)
        responses = tuple(_responses(loaded, messages, text, where)) if self._responses else ()
        return Written(text, by_template=True, responses=responses)


def question(tokenizer: Tokenizer, text: str) -> str:
    """A message of the user by the chat template, with the beginning of the response that is to follow.

    Raises:
      InputError: the tokenizer has no chat template, it refuses the message, or jinja2 is not installed.
    """
    if not getattr(tokenizer.call, "chat_template", None):
        raise InputError(f"{tokenizer.folder}: the tokenizer has no chat template; leave --chat out")
    return _rendered(tokenizer, [{"role": "user", "content": text}], "the prompt", prompt=True)


def _rendered(tokenizer: Tokenizer, messages: list[dict[str, str]], where: str, prompt: bool = False) -> str:
    """Messages by the chat template; with `prompt` also the beginning of the response that is to follow."""
    try:
        return str(
            getattr(tokenizer.call, "apply_chat_template")(  # noqa: B009  of transformers
                messages, tokenize=False, add_generation_prompt=prompt, date_string=TODAY
            )
        )
    except ImportError as error:
        raise InputError(f"{where}: chat templates need the data extra: pip install 'minillm-jax[data]'") from error
    except Exception as error:  # templates raise many types
        raise InputError(
            f"{where}: the chat template of {tokenizer.folder} refuses the conversation "
            f"({shortened(cause(error), 200)})"
        ) from error


def _responses(tokenizer: Tokenizer, messages: list[dict[str, str]], text: str, where: str) -> Iterator[Span]:
    """The responses in the text of all messages: each begins where the prompt for it ends."""
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        start = text.find(message["content"].strip())  # where the first message is one, no prompt precedes it
        if number:
            prompt = _rendered(tokenizer, messages[:number], where, prompt=True)
            start = len(prompt) if text.startswith(prompt) else -1
        end = -1 if start < 0 else _end(_rendered(tokenizer, messages[: number + 1], where), message, text, start)
        if end < 0:
            raise InputError(
                f"{where}: the chat template of {tokenizer.folder} writes the conversation up to message {number + 1} "
                "in another way once messages follow, so that the responses cannot be told from the prompts; use "
                "--loss-on all"
            )
        yield start, end


def _end(alone: str, message: dict[str, str], text: str, start: int) -> int:
    """The end of the response that starts at a character of the text; -1 where it cannot be found.

    Some templates write the last response with more words than earlier ones, an empty thought for example. There the
    response ends behind its content and the mark that closes it.

    Args:
      alone: the text of the messages up to the response.
      message: the response.
      text: of all messages.
      start: the response's first character in it.
    """
    content = message["content"].strip()
    if not text.startswith(alone):
        places = (match.start() for match in re.finditer(f"(?={re.escape(content)})", alone))
        closed = next((alone[place:] for place in places if text.startswith(alone[place:], start)), None)
        if closed is None:
            return -1
        alone = text[:start] + closed
    response = alone[start:].rstrip()
    # White space behind a mark belongs to no response; without a mark, it closes the response itself.
    return len(alone) if response.endswith(content) else start + len(response)
