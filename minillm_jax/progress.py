"""Progress of a job, reported to a callback; and the seconds of its stages."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

# Called with the name of a stage, the number of its finished steps and the number of all its steps.
StageProgress = Callable[[str, int, int], None]


def tell(progress: StageProgress | None, stage: str, done: int, total: int) -> None:
    """Calls `progress`, if it is given, with the stage and its finished and total steps."""
    if progress is not None:
        progress(stage, done, total)


def in_turn(progress: Callable[[int, int], None], sizes: Sequence[int]) -> Iterator[Callable[[int, int], None]]:
    """Callbacks for the parts of one stage, in their order: each reports its steps as steps of the whole stage.

    Args:
      progress: called with the number of finished steps, and of all.
      sizes: number of steps of each part.
    """
    for start in accumulate(sizes[:-1], initial=0):
        yield lambda done, _total, start=start: progress(start + done, sum(sizes))


class Clock:
    """Seconds of each stage, by name; the seconds of a stage that occurs twice add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage that began with the clock or with the last lap."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
