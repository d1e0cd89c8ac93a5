"""Model FLOPs of the loss, and the peak FLOP/s of devices. A module of the benchmarks, not a script.

Model FLOPs of the loss of B sequences of T tokens; a multiplication and an addition count as two:

    blocks      2 · B · T · parameters of all block matrices
    attention   2 · 2 · B · T · T · H · (query heads of all layers): scores and values over the full square T × T, as
                this package computes them and as PaLM counts them (arXiv 2204.02311, appendix B), not its causal half
    head        2 · B · (T - 1) · V · E, because the last position predicts nothing, plus the projections of the
                embedding at every position (OPT-350m)

Norms, activations, softmax, rotary positions, masks and the embedding are not counted. The utilisation (MFU) is these
FLOPs / time / peak.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import DTypeLike
from timing import Program

from minillm_jax.model import ops
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import Block, run_letters
from minillm_jax.model.tree import kernels

# Dense peaks in FLOP/s by `device_kind`, from the data sheets: bfloat16, and float32 without TF32. A float32 product of
# precision HIGHEST takes six bfloat16 passes on a TPU, so its float32 peak is a sixth.
PEAKS: dict[str, tuple[float, float]] = {
    "NVIDIA H100 80GB HBM3": (989e12, 67e12),  # SXM
    "NVIDIA H200": (989e12, 67e12),  # SXM
    "NVIDIA A100-SXM4-40GB": (312e12, 19.5e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 19.5e12),
    "NVIDIA A100 80GB PCIe": (312e12, 19.5e12),
    "TPU v4": (275e12, 275e12 / 6),
    "TPU v5 lite": (197e12, 197e12 / 6),
    "TPU v5e": (197e12, 197e12 / 6),
    "TPU v5": (459e12, 459e12 / 6),
    "TPU v5p": (459e12, 459e12 / 6),
    "TPU v6 lite": (918e12, 918e12 / 6),
    "TPU v6e": (918e12, 918e12 / 6),
}


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one loss, by part of the model."""

    blocks: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.blocks + self.attention + self.head


def loss_flops(decoder: Decoder, batch: int, length: int) -> Flops:
    """Model FLOPs of `sequence_losses` on [batch, length] tokens; the decoder may be abstract."""
    per_run = [run_flops(run, batch, length) for run in decoder.runs]
    vocabulary, width = decoder.embedding.shape
    projections = [linear.kernel for linear in (decoder.project_in, decoder.project_out) if linear is not None]
    head = 2 * batch * (length - 1) * vocabulary * width + 2 * batch * length * sum(p.size for p in projections)
    return Flops(sum(blocks for blocks, _ in per_run), sum(attention for _, attention in per_run), head)


def run_flops(run: Block, batch: int, length: int) -> tuple[int, int]:
    """Model FLOPs of a run of equal layers: of its matrices, and of its attention."""
    letters = run_letters(run)
    depth = run.attention.q.kernel.shape[0]
    matrices = 2 * batch * length * sum(kernel.size for kernel in kernels(run).values())
    return matrices, 4 * batch * length * length * depth * letters["N"] * letters["H"]


def known_peak(device: Any, dtype: DTypeLike) -> float | None:
    """The peak of a device for a type, in FLOP/s, from `PEAKS`; None for an unknown device."""
    bfloat16, float32 = PEAKS.get(device.device_kind, (None, None))
    return float32 if jnp.dtype(dtype) == jnp.float32 else bfloat16


def square_product(size: int, dtype: DTypeLike) -> tuple[Program, float]:
    """A large matrix product, computed as in the model, and its FLOPs. It gives the peak of an unknown device."""
    x, y = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    return partial(jax.jit(partial(ops.einsum, "AB,BC->AC")), x, y), 2.0 * size**3
