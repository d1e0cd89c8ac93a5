"""Progress of a job, reported to a callback."""

from collections.abc import Callable

# Called with the name of a stage, the number of its finished steps and the number of all its steps.
StageProgress = Callable[[str, int, int], None]


def tell(progress: StageProgress | None, stage: str, done: int, total: int) -> None:
    """Calls `progress`, if it is given, with the stage and its finished and total steps."""
    if progress is not None:
        progress(stage, done, total)
