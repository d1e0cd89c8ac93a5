"""Operations and memory of the pruning of experts, by formula from the shapes; a part of `plan`."""

from dataclasses import dataclass

from minillm_jax.model import costs
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth, run_letters
from minillm_jax.pruning.expert_refit import SWEEPS
from minillm_jax.recipes.recipe import Recipe
from minillm_jax.settings import OF_EXPERTS

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """What the pruning of experts does.

    Attributes:
      samples: calibration windows.
      length: tokens of a window.
      batch: tokens of a batch.
      refits: whether the down projections are refitted.
      narrows: whether channels inside experts are removed.
      holds_out: whether held-out windows choose the ridges.
    """

    samples: int
    length: int
    batch: int
    refits: bool
    narrows: bool
    holds_out: bool

    @property
    def tokens(self) -> int:
        """All calibration tokens."""
        return self.samples * self.length


def work_of(recipe: Recipe, samples: int, length: int, batch: int) -> Work | None:
    """The work of a recipe; None for one that leaves the experts as they are."""
    structures = set(recipe.budget.structures)
    if not structures & set(OF_EXPERTS):
        return None
    refits = recipe.refit.method == "least-squares"
    return Work(samples, length, batch, refits, "expert-channels" in structures, recipe.refit.ridge is None)


def flops(dense: Decoder, work: Work) -> float:
    """Floating-point operations on the devices.

    The pruned residual stream passes every layer once. Its experts compute once more for their scores, which counts as
    a whole pass. With a refit the dense stream passes too. A sweep computes the dense and the pruned layer, and all
    channels of every expert for all tokens with their Gram matrices. The scores of channels need no matrices.
    """
    assert dense.config.routing is not None, "the model has experts"
    chosen = dense.config.routing.chosen
    total = 2.0 * costs.cost(dense, "macs", work.length) * work.samples * (2 + work.refits)
    for run in dense.runs:
        size = run_letters(run)
        d, w, experts = size["D"], size["W"], depth(run) * size["X"]
        channels, gram = 2 * d * w, w * w + w * d
        sweep = 2 * depth(run) * min(size["X"], chosen) * 3 * d * w + experts * (channels + gram)
        total += 2.0 * work.tokens * (SWEEPS * work.refits * sweep + work.narrows * experts * channels)
    return total


def memory(dense: Decoder, work: Work, parked: bool = False) -> int:
    """Bytes of one device beside the weights: residual streams, rows of the chosen experts, and the moments of a layer.

    Args:
      dense: the model.
      work: what is done.
      parked: whether the streams are in the memory of the host but for one batch, as those of a streamed model.
    """
    assert dense.config.routing is not None, "the model has experts"
    sizes = [run_letters(run) for run in dense.runs]
    d, w, experts = (max(size[letter] for size in sizes) for letter in "DWX")
    streams = (1 + work.refits) * (work.batch if parked else work.tokens) * d
    rows = work.batch * (4 * d + dense.config.routing.chosen * (2 * d + 3 * w))
    moments = work.refits * (2 + work.holds_out) * experts * (w * w + w * d)
    return FLOAT * (streams + rows + moments)
