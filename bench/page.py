"""Puts the tables of the committed results into the pages that quote them.

    python bench/page.py

A page marks each made part with two comments, `<!-- made: study SmolLM2-135M -->` and `<!-- end -->`. The lines between
them are replaced; all others are written by hand. `tests/test_readme.py` checks that the pages are up to date.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import evaluation_tables
import expert_tables
import recover_tables
import speed_tables
import study_tables
import tables

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("evaluation", "experts", "quality", "recovery", "scale", "speed")),
)

_PART = re.compile(r"(<!-- made: (\w+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def quality(model: str, shown: Sequence[str] | None = None) -> list[str]:
    """The table of one of the small models, with all its recipes or with some."""
    ratios = next(iter(tables.quality(model).values()))
    return [
        *study_tables.table(["recipe", *(f"{100 * ratio:.0f} %" for ratio in ratios)], []),
        *tables.quality_rows(model, shown),
    ]


def under(heads: Sequence[str], rows: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """A table that takes no word: its heads, then the rows of a function."""
    return lambda _: [*study_tables.table(heads, []), *rows()]


# Name of a part -> its lines, from the word behind the name.
PARTS: dict[str, Callable[[str], list[str]]] = {
    "study": study_tables.section,
    "peers": study_tables.peers_table,
    "quality": quality,
    "shown": lambda model: quality(model, tables.SHOWN),
    "beaten": under(["model", "ratio", "recipe", "× dense", "the default"], tables.beaten_rows),
    "cost": under(["recipe", *tables.MODELS], tables.cost_rows),
    "harness": evaluation_tables.harness_table,
    "folders": evaluation_tables.folders_table,
    "evaluation": evaluation_tables.evaluation_table,
    "samples": evaluation_tables.samples_table,
    "recovery": recover_tables.recovery_table,
    "ranks": recover_tables.rank_table,
    "experts": expert_tables.experts_table,
    "adapters": expert_tables.adapters_table,
    "training": recover_tables.speed_table,
    "speed": speed_tables.speed_table,
    "job": speed_tables.tpu_job_table,
    "slices": speed_tables.tpu_slices_table,
    "large": speed_tables.large_table,
    "tpu": speed_tables.tpu_table,
    "stream": speed_tables.stream_table,
    "flags": speed_tables.flags_table,
    "memory": speed_tables.memory_table,
    "refit": under(["part", "host", "device"], tables.refit_rows),
}


def filled(page: str) -> str:
    """A page with all its made parts as the results give them.

    Raises:
      KeyError: a part has a name that is not in `PARTS`.
    """

    def part(match: re.Match[str]) -> str:
        lines = "\n".join(PARTS[match[2]](match[3] or ""))
        return f"{match[1]}\n{lines}\n\n{match[4]}" if lines else f"{match[1]}{match[4]}"

    return _PART.sub(part, page)


def main() -> None:
    """Fill in all pages."""
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
