"""Time and memory of a training step of low-rank adapters: ours and PEFT's in PyTorch, on the same shape.

    python bench/recover_speed.py [--shape 25M] [--batch 4] [--length 256] [--dtype float32] [--rounds 9]
        [--output FILE]

A step is the forward pass, the backward pass and an update of AdamW, for adapters of rank 8 on all linear maps, without
dropout. The programs take turns in one process. `ours` keeps the outputs of linear maps for the backward pass, `stream
kept` the residual stream before every layer alone, `all kept` everything. Peak memory is that of a process of its own
which does three steps of one program alone: its resident memory, or what it takes on the accelerator. PEFT runs the
stock `LlamaForCausalLM` with PyTorch's fused attention on the same device, and takes the loss as transformers does.
`products` are the products with the frozen matrices alone, which every step needs: once for the activations, once for
their gradients. `all products` are also those of the adapters and of attention, without keys behind a part of the
queries, and without anything that is computed again. No step can be faster.
Adapters and the optimiser are float32 whatever the type of the weights.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import environment
from processes import FLAG, cost, end_with_parent, launch

PROGRAMS = (
    "ours",
    "ours, stream kept",
    "ours, all kept",
    "PEFT",
    "products, XLA",
    "products, PyTorch",
    "all products, XLA",
)
RANK = 8
KEPT = {"ours": "products", "ours, stream kept": "stream", "ours, all kept": "all"}


def program_of(name: str, shape: str, batch: int, length: int, dtype: str) -> Callable[[], Any]:
    """A program that does one training step."""
    if name.startswith("products"):
        matrices = matrices_of(shape)
        function = products_of_xla if name.endswith("XLA") else products_of_torch
        return function(matrices, batch * length, dtype)
    if name.startswith("all products"):
        return all_products_of_xla(shape, batch, length, dtype)
    if name == "PEFT":
        return peft_step(shape, batch, length, dtype)
    return our_step(shape, batch, length, dtype, KEPT[name])


def our_step(shape: str, batch: int, length: int, dtype: str, activations: str) -> Callable[[], Any]:
    """A training step of this package."""
    import jax
    from jax import numpy as jnp
    from shapes import random_decoder, random_tokens

    from minillm_jax.recovery import gradients
    from minillm_jax.recovery.objective import Sequences, Weights
    from minillm_jax.recovery.optimizer import optimizer
    from minillm_jax.recovery.rules import ByGradient
    from minillm_jax.recovery.settings import Lora, Training
    from minillm_jax.recovery.trained import TrainedAdapter

    decoder = random_decoder(shape, dtype)
    trained = TrainedAdapter(Lora(RANK, 2.0 * RANK), activations)
    steps = optimizer(Training(batch=batch, micro_batch=batch), 1000)
    update = ByGradient(gradients.backward(trained), steps).program()
    tokens = random_tokens(decoder.embedding.shape[0], batch, length)
    counted = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    rest = (
        Sequences(tokens, counted),
        Weights(jnp.float32(0), jnp.float32(1)),
        jnp.float32(1 / (batch * (length - 1))),
    )
    state: list[Any] = [trained.initial(decoder, 0)]
    state.append(steps.init(state[0]))

    def step() -> Any:
        state[0], state[1], found = update(state[0], state[1], decoder, gradients.Part(None, *rest, jax.random.key(0)))
        return found

    return step


def peft_step(shape: str, batch: int, length: int, dtype: str) -> Callable[[], Any]:
    """A training step of PEFT."""
    import peft
    import torch
    from torch_pair import llama

    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = peft.get_peft_model(llama(shape, device, getattr(torch, dtype)), settings).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-4, weight_decay=0.0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def matrices_of(shape: str) -> list[tuple[int, int]]:
    """The shapes of all matrices of the layers and of the head, of a model whose layers are equal."""
    from shapes import SHAPES

    sizes = SHAPES[shape]
    layer, width, wide = sizes.layers[0], sizes.D, sizes.layers[0].F
    heads, keys = layer.N * sizes.H, layer.K * sizes.H
    of_layer = [
        (width, heads),
        (width, keys),
        (width, keys),
        (heads, width),
        (width, wide),
        (width, wide),
        (wide, width),
    ]
    return len(sizes.layers) * of_layer + [(width, sizes.V)]


def products_of_xla(matrices: list[tuple[int, int]], tokens: int, dtype: str) -> Callable[[], Any]:
    """The products with these matrices that a step needs: of the activations, and of their gradients."""
    import jax
    from jax import numpy as jnp

    kernels = {shape: jnp.full(shape, 1 / shape[0], dtype) for shape in set(matrices)}
    x = {width: jnp.ones((tokens, width), dtype) for shape in kernels for width in shape}

    @jax.jit
    def both(kernel: jax.Array, x: jax.Array, gradient: jax.Array) -> Any:
        return jnp.matmul(x, kernel, precision="highest"), jnp.matmul(gradient, kernel.T, precision="highest")

    def step() -> None:
        for shape in matrices:
            jax.block_until_ready(both(kernels[shape], x[shape[0]], x[shape[1]]))

    return step


def all_products_of_xla(shape: str, batch: int, length: int, dtype: str) -> Callable[[], Any]:
    """All products of a step: those of `products_of_xla`, of the adapters, and of attention."""
    import jax
    from jax import numpy as jnp
    from shapes import SHAPES

    from minillm_jax.model.attention import parts_of

    sizes, tokens, matrices = SHAPES[shape], batch * length, matrices_of(shape)
    with_kernels = products_of_xla(matrices, tokens, dtype)
    layer, parts = sizes.layers[0], parts_of(length)
    x = {width: jnp.ones((tokens, width), dtype) for pair in matrices for width in pair}
    factors = {width: jnp.full((width, RANK), 1 / width, dtype) for width in x}
    rows = jnp.ones((batch, layer.N, length // parts, sizes.H), dtype)
    of_parts = [jnp.concatenate([rows] * part, axis=2) for part in range(1, parts + 1)]  # keys and values of a part

    @jax.jit
    def of_adapter(a: jax.Array, b: jax.Array, x: jax.Array, gradient: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            inner, back = x @ a, gradient @ b
            return inner @ b.T, back @ a.T, x.T @ back, inner.T @ gradient

    @jax.jit
    def of_attention(rows: jax.Array, keys: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            scores, slopes = rows @ keys.mT, rows @ (2 * keys).mT  # of the queries; of the gradient, with the values
            forward = scores @ keys, slopes @ keys
            return *forward, scores.mT @ rows, slopes.mT @ rows

    def step() -> None:
        with_kernels()
        for first, last in matrices[:-1]:
            jax.block_until_ready(of_adapter(factors[first], factors[last], x[first], x[last]))
        for keys in len(sizes.layers) * of_parts:
            jax.block_until_ready(of_attention(rows, keys))

    return step


def products_of_torch(matrices: list[tuple[int, int]], tokens: int, dtype: str) -> Callable[[], Any]:
    """The same in PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    kernels = {shape: torch.full(shape[::-1], 1 / shape[0], **settings) for shape in set(matrices)}
    x = {width: torch.ones((tokens, width), **settings) for shape in kernels for width in shape}

    def step() -> None:
        for shape in matrices:
            torch.matmul(x[shape[0]], kernels[shape].T)
            torch.matmul(x[shape[1]], kernels[shape])
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The peak memory of a process that runs three steps of one program."""
    program = program_of(row["program"], row["shape"], row["batch"], row["length"], row["dtype"])
    for _ in range(3):
        result = program()
        if result is not None:
            import jax

            jax.block_until_ready(result)
    spent = cost()
    return spent | {"peak_bytes": spent.get("device_bytes", spent["peak_bytes"])}


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="25M")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure the memory of one program for the flag `--row`; else time all programs and write the JSON."""
    if sys.argv[1:2] == [FLAG]:
        end_with_parent()
        print(json.dumps(measure(json.loads(sys.argv[2]))))
        return
    from timing import medians, take_turns

    arguments = parse_arguments()
    shape = {key: getattr(arguments, key) for key in ("shape", "batch", "length", "dtype")}
    memory = {name: launch(Path(__file__), shape | {"program": name}) for name in PROGRAMS}
    programs = {name: program_of(name, *shape.values()) for name in PROGRAMS}
    seconds = medians(take_turns(programs, arguments.rounds))
    rows = [
        shape
        | {
            "program": name,
            "seconds": round(seconds[name], 4),
            "tokens_per_second": round(arguments.batch * arguments.length / seconds[name], 1),
            "speed": round(seconds["PEFT"] / seconds[name], 3),
            "peak_bytes": memory[name]["peak_bytes"],
            "memory": round(memory[name]["peak_bytes"] / memory["PEFT"]["peak_bytes"], 3),
        }
        for name in PROGRAMS
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
