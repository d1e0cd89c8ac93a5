"""The bundled demo model and the text it was trained and is measured on: Python's own reference manual."""

from pathlib import Path
from pydoc_data.topics import topics

FOLDER = Path(__file__).parent / "demo_model"

# A tenth of the topics, chosen by name from different parts of the manual. Never trained on.
HELD_OUT = ("calls", "dict", "lists", "objects", "raise", "return", "slicings", "typesmapping")

PARAGRAPH = "\n\n"


def held_out_text() -> str:
    """The topics kept for evaluation, joined by blank lines."""
    return PARAGRAPH.join(topics[name].strip() for name in HELD_OUT if name in topics)


def training_text() -> str:
    """The other topics, each paragraph once, without those that also stand in a held-out topic.

    The manual repeats itself: some paragraphs stand in several topics, and would otherwise leak into the evaluation.
    """
    seen = {_key(paragraph) for paragraph in held_out_text().split(PARAGRAPH)}
    kept = []
    for name in sorted(topics.keys() - set(HELD_OUT)):
        for paragraph in topics[name].strip().split(PARAGRAPH):
            if _key(paragraph) not in seen:
                seen.add(_key(paragraph))
                kept.append(paragraph)
    return PARAGRAPH.join(kept)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())
