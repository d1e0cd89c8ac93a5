"""PyTorch programs of the comparison: forward loss, MeZO pair and backward pass on the LLaMA shapes of `shapes`.

    python bench/torch_pair.py [--shape 25M] [--batch 8] [--length 128] [--rounds 15] [--device cpu]

The model is the stock `LlamaForCausalLM` of transformers with PyTorch's fused attention (sdpa) and random weights, in
eager mode, with PyTorch's default float32 products (no TF32). The functions return programs for `timing.take_turns`. A
program waits until its result is ready, on an accelerator too.

The pair is that of MeZO (Malladi et al., arXiv 2305.17333), in the fastest form found. All block matrices are moved in
place by +ε, -2ε and +ε; the last step restores them. Each step draws z again from its seed, into one buffer of the size
of the largest matrix. On a CPU PyTorch draws normal numbers on one thread, so every matrix has its own seed and threads
share the matrices. One random word gives 64 signs by a table of all bytes: this takes about a fifth of the time of
`torch.randint`, and at most a tenth of that of `bernoulli_`.
"""

import argparse
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from shapes import CONFIG, SHAPES
from timing import Program, medians, take_turns
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

DISTRIBUTIONS = ("gaussian", "rademacher")


def llama(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """A model of a shape of `shapes` with random weights, made on the device. PyTorch may use all cores.

    Raises:
      ValueError: the layers of the shape have unequal sizes, or the configuration has no rotary positions.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    sizes = SHAPES[name]
    if len(set(sizes.layers)) != 1 or CONFIG.rope is None:
        raise ValueError(f"{name}: LlamaForCausalLM needs layers of equal size and rotary positions")
    config = LlamaConfig(
        vocab_size=sizes.V,
        hidden_size=sizes.D,
        head_dim=sizes.H,
        num_hidden_layers=len(sizes.layers),
        num_attention_heads=sizes.layers[0].N,
        num_key_value_heads=sizes.layers[0].K,
        intermediate_size=sizes.layers[0].F,
        rms_norm_eps=CONFIG.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope.theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return model.eval().requires_grad_(False)


def random_tokens(name: str, batch: int, length: int, device: str = "cpu", seed: int = 1) -> torch.Tensor:
    """Token ids, int64 [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPES[name].V, (batch, length), generator=generator).to(device)


def block_matrices(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """The perturbed matrices: all of every layer, as in minillm_jax; not the embedding, the norms and the head."""
    return [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]


def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy over all sequences, float32, in nats; the last position has no logits."""
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden).flatten(0, 1)
    return functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------ programs


def forward_program(model: LlamaForCausalLM, tokens: torch.Tensor) -> Callable[[], float]:
    """The loss without gradients."""

    @torch.no_grad()
    def program() -> float:
        return mean_loss(model, tokens).item()

    return program


def pair_program(
    model: LlamaForCausalLM, tokens: torch.Tensor, epsilon: float, seed: int, distribution: str
) -> Callable[[], tuple[float, float]]:
    """The losses at ε and at -ε. The weights return to their values up to rounding."""
    move = perturber(block_matrices(model), distribution)

    @torch.no_grad()
    def program() -> tuple[float, float]:
        move(epsilon, seed)
        plus = mean_loss(model, tokens)
        move(-2 * epsilon, seed)
        minus = mean_loss(model, tokens)
        move(epsilon, seed)
        _wait(tokens.device)
        return plus.item(), minus.item()

    return program


def gradient_program(
    model: LlamaForCausalLM, tokens: torch.Tensor
) -> Callable[[], tuple[float, Sequence[torch.Tensor]]]:
    """The loss and its gradients by all block matrices, by a backward pass that keeps all activations."""
    matrices = block_matrices(model)

    def program() -> tuple[float, Sequence[torch.Tensor]]:
        for matrix in matrices:
            matrix.requires_grad_(True)
        loss = mean_loss(model, tokens)
        gradients = torch.autograd.grad(loss, matrices)
        for matrix in matrices:
            matrix.requires_grad_(False)
        _wait(tokens.device)
        return loss.item(), gradients

    return program


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------- perturbation


def perturber(matrices: Sequence[torch.Tensor], distribution: str) -> Callable[[float, int], None]:
    """A function `move(scale, seed)` that adds scale · z to every matrix in place, with the z of that seed."""
    matrices = [matrix.detach() for matrix in matrices]
    scratch = _Scratch(max(matrix.numel() for matrix in matrices), matrices[0])
    draw = {"gaussian": scratch.normals, "rademacher": scratch.signs}[distribution]
    workers = _workers(os.cpu_count() or 1) if matrices[0].device.type == "cpu" else None

    def move(scale: float, seed: int) -> None:
        def move_matrix(ordinal: int) -> None:
            matrix = matrices[ordinal]
            matrix.add_(draw(matrix.numel(), seed * len(matrices) + ordinal).view(matrix.shape), alpha=scale)

        map_ = map if workers is None else workers.map
        for _ in map_(move_matrix, range(len(matrices))):
            pass

    return move


class _Scratch(threading.local):
    """Random generator and buffers of one thread; the buffers hold the largest matrix."""

    def __init__(self, largest: int, like: torch.Tensor):
        words = -(-largest // 64)
        self._generator = torch.Generator(like.device)
        self._words = torch.empty(words, dtype=torch.int64, device=like.device)
        self._z = torch.empty(words * 64, dtype=like.dtype, device=like.device)
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        self._table = (2 * bits - 1).to(like.device, like.dtype)  # [byte, 8 signs]

    def normals(self, count: int, seed: int) -> torch.Tensor:
        """Standard normals, valid until the next call."""
        return self._z[:count].normal_(generator=self._generator.manual_seed(seed))

    def signs(self, count: int, seed: int) -> torch.Tensor:
        """Random signs, valid until the next call."""
        words = self._words[: -(-count // 64)]
        # With the default bounds the sixty-fourth bit is always zero.
        words.random_(-(2**63), None, generator=self._generator.manual_seed(seed))
        spread = self._z[: words.numel() * 64]
        torch.index_select(self._table, 0, words.view(torch.uint8).int(), out=spread.view(-1, 8))
        return spread[:count]


def _workers(count: int) -> ThreadPoolExecutor:
    """A pool of threads that run PyTorch on one core each. The calling thread keeps all cores for the passes."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # the first operation would otherwise undo the next line
        torch.set_num_threads(1)
        started.wait()

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)
    return pool


def main() -> None:
    """Print a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="25M", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    model = llama(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    tokens = random_tokens(arguments.shape, arguments.batch, arguments.length, arguments.device)
    programs: dict[str, Program] = {"forward": forward_program(model, tokens)}
    for name in DISTRIBUTIONS:
        programs[f"pair, {name}"] = pair_program(model, tokens, epsilon=1e-3, seed=0, distribution=name)
    programs["forward and backward"] = gradient_program(model, tokens)
    times = medians(take_turns(programs, arguments.rounds))
    for name, time in times.items():
        row: dict[str, Any] = {"program": name, "milliseconds": round(1e3 * time, 1)}
        print(json.dumps(row | {"forwards": round(time / times["forward"], 3)}))


if __name__ == "__main__":
    main()
