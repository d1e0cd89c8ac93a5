"""The bundled demo model, and its training and evaluation text: the reference manual of Python."""

from pathlib import Path
from pydoc_data.topics import topics

FOLDER = Path(__file__).parent / "demo_model"

# The topics of the evaluation text, about a tenth of the manual, from different parts of it. Not in the training text.
HELD_OUT = ("calls", "dict", "lists", "objects", "raise", "return", "slicings", "typesmapping")

# Options of the recovery: a pass over a third of the training text, in half a minute on two cores.
RECOVERY = {"seq_len": 128, "steps": 16, "batch": 16, "micro_batch": 16, "learning_rate": 1e-3, "validate_every": 8}

PARAGRAPH = "\n\n"


def held_out_text() -> str:
    """The evaluation text: the held-out topics, joined by blank lines."""
    return PARAGRAPH.join(topics[name].strip() for name in HELD_OUT if name in topics)


def training_text() -> str:
    """The training text: the paragraphs of all other topics, each once, without the paragraphs of held-out topics.

    Some paragraphs of the manual occur in several topics and would otherwise be in both texts.
    """
    seen = {_key(paragraph) for paragraph in held_out_text().split(PARAGRAPH)}
    paragraphs = []
    for name in sorted(topics.keys() - set(HELD_OUT)):
        for paragraph in topics[name].strip().split(PARAGRAPH):
            if _key(paragraph) not in seen:
                seen.add(_key(paragraph))
                paragraphs.append(paragraph)
    return PARAGRAPH.join(paragraphs)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())
