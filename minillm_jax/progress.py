"""How long jobs say how far they are, without knowing who listens."""

from collections.abc import Callable

# Called with a stage's name, how much of it is done, and how much there is.
StageProgress = Callable[[str, int, int], None]


def tell(progress: StageProgress | None, stage: str, done: int, total: int) -> None:
    """Pass a stage's progress on, if anybody listens."""
    if progress is not None:
        progress(stage, done, total)
