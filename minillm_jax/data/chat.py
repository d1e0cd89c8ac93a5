"""Rows of conversations: which fields hold one, its messages, and its text by the chat template of a tokenizer.

Three forms are read: `messages`, a list of objects with a role and a content; `prompt` with `response` or `completion`;
and `instruction`, `input` and `output`, the fields of Stanford Alpaca.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from minillm_jax.data.rows import kind_of_value, named, text_of
from minillm_jax.data.tokenizing import Tokenizer
from minillm_jax.errors import InputError, cause, shortened, warn

# The form of a row that holds its text in a field of its own.
TEXT = "text"

_MESSAGES, _PAIR, _ALPACA = "messages", "pair", "alpaca"

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


class Conversation(NamedTuple):
    """The messages of one row.

    Attributes:
      messages: role and content of each.
      plain: their text where there is no chat template.
      published: whether `plain` is a published prompt.
    """

    messages: tuple[tuple[str, str], ...]
    plain: str
    published: bool


class Written(NamedTuple):
    """The text of a conversation.

    Attributes:
      text: the text.
      by_template: whether a chat template wrote it, with its own marks of the beginning and the end.
    """

    text: str
    by_template: bool


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
        return _plainly((("user", first), ("assistant", second)))
    more = text_of({"input": None, **row}, "input", where).strip()
    prompt = (_WITH_INPUT if more else _WITHOUT_INPUT).format(instruction=first, input=more)
    question = f"{first}\n\n{more}" if more else first
    return Conversation((("user", question), ("assistant", second)), prompt + second, published=True)


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
    return Conversation(messages, "\n".join(f"{role}: {content}" for role, content in messages), published=False)


# --------------------------------------------------------------------------------------------------------- writing


def plainly(conversation: Conversation, _where: str) -> Written:
    """The text of a conversation without a chat template: Alpaca's prompt, or a line `role: content` for a message."""
    return Written(conversation.plain, by_template=False)


class Templated:
    """Writes conversations by the chat template of a tokenizer; plainly, with a warning, where it has none.

    Args:
      tokenizer: loads the tokenizer; called for every conversation.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer]) -> None:
        self._tokenizer, self._warned = tokenizer, False

    def __call__(self, conversation: Conversation, where: str) -> Written:
        """The text of a conversation.

        Raises:
          InputError: the template refuses the conversation, or jinja2 is not installed.
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
        try:
            text = getattr(loaded.call, "apply_chat_template")(messages, tokenize=False)  # noqa: B009  of transformers
        except ImportError as error:
            raise InputError(f"{where}: chat templates need the data extra: pip install 'minillm-jax[data]'") from error
        except Exception as error:  # templates raise many types
            raise InputError(
                f"{where}: the chat template of {loaded.folder} refuses the conversation "
                f"({shortened(cause(error), 200)})"
            ) from error
        return Written(str(text), by_template=True)
