"""Largest difference of logits from transformers in float32, for every configuration of the tests, dense and pruned.

    PYTHONPATH=. python bench/parity.py
    PYTHONPATH=. python bench/parity.py --add    # only the configurations that the result lacks

Every parameter is random. A pruned model has lost a random third of the heads and channels of every layer, a different
number in each; a mixture of experts a random third of the experts of every layer, equally many of each group. It is
written to a folder, which transformers loads.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from convert.reader import read_model
from convert.writer import write_model
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.tree import group_counts
from minillm_jax.pruning.slicing import slice_groups
from tests.helpers import (
    CONFIGURATIONS,
    MIXTURES,
    hugging_face_folder,
    load_torch,
    logits_of,
    random_tokens,
    torch_logits,
)

RESULT = Path(__file__).parent / "results" / "parity.json"
ALL = CONFIGURATIONS | {family: (family, {}) for family in MIXTURES}
TOKENS = random_tokens(97, 2, 130)


def row(name: str, folder: Path) -> dict[str, Any]:
    """The differences of one configuration."""
    family, changes = ALL[name]
    model = read_model(hugging_face_folder(folder / "dense", family, **changes))
    logits = logits_of(model.decoder, TOKENS)
    dense = np.abs(logits - torch_logits(load_torch(folder / "dense"), TOKENS)).max()
    smaller = dataclasses.replace(model, decoder=slice_groups(model.decoder, random_groups(model.decoder)))
    written = write_model(smaller, folder / "pruned").format
    by_torch = torch_logits(load_torch(folder / "pruned"), TOKENS)
    pruned = np.abs(logits_of(smaller.decoder, TOKENS) - by_torch).max()
    found = {"dense": float(dense), "pruned": float(pruned), "largest_logit": float(np.abs(logits).max())}
    return {"family": family, "configuration": name, "format": written, **found}


def random_groups(decoder: Decoder) -> axis_table.Kept:
    """Random groups that are kept: heads and channels, or experts of a mixture."""
    rng, kept, routing = np.random.default_rng(0), {}, decoder.config.routing
    if routing is not None:
        counts, groups = group_counts(decoder, "expert"), routing.groups
        each = [n // groups for n in counts]
        starts = [np.arange(groups)[:, None] * n for n in each]
        rows = [[rng.choice(n, n - n // 3, replace=False) for _ in range(groups)] for n in each]
        return {"expert": [np.sort((start + row).ravel()) for start, row in zip(starts, rows, strict=True)]}
    for kind in axis_table.KINDS:
        counts = group_counts(decoder, kind)
        fewer = [max(1, round(count * (0.8 - 0.1 * layer))) for layer, count in enumerate(counts)]
        kept[kind] = [np.sort(rng.choice(n, few, replace=False)) for n, few in zip(counts, fewer, strict=True)]
    return kept


def main() -> None:
    """Measure all configurations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--add", action="store_true", help="measure only the configurations that the output lacks")
    options, about = parser.parse_args(), environment()
    output, former, added = options.output, {}, {}
    if options.add:
        result = json.loads(output.read_text(encoding="utf-8"))
        former, added = {row["configuration"]: row for row in result["rows"]}, {"commit": about["commit"]}
        assert result["environment"] | added == about, "the rows of one result need one machine and one set of versions"
        about = result["environment"]
    rows: list[dict[str, Any]] = []
    for name in ALL:
        if name in former:
            rows.append(former[name])
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, Path(folder)) | added)
        print(json.dumps(rows[-1]))
    result = {"environment": about, "tokens": TOKENS.size, "rows": rows}
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
