"""Train a small mixture of experts (Qwen 3 MoE, 8 experts of which 2, 2.7 million parameters) for `bench/experts.py`.

    python bench/train_moe.py --text stories.txt --output moe_model [--steps 1500]

The last tenth of the text is held out: its first half decides which checkpoint is written, the rest becomes
`held_out.txt` in the output folder. Router and experts are trained with the load-balancing loss of Switch Transformers
(Fedus et al., arXiv 2101.03961, equation 4): X · Σ (share of the choices of expert j) · (mean probability of expert j).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from train_demo import LENGTH, draw_windows, train_tokenizer

from convert.writer import new_folder, write_model
from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.data.windows import cut
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model import experts
from minillm_jax.model.build import build, initialise
from minillm_jax.model.decoder import Decoder, embed, finish, rotary_angles, scan_layers
from minillm_jax.model.families import parse
from minillm_jax.model.layer import apply_layer
from minillm_jax.model.loaded import Model
from minillm_jax.model.loss import token_losses
from minillm_jax.model.modules import Block, experts_of
from minillm_jax.model.tree import parameter_count

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 512,
    "moe_intermediate_size": 192,
    "num_local_experts": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    "sliding_window": None,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}

BATCH = 8
BALANCE = 0.01
WEIGHT_DECAY = 0.1


def hidden_and_balance(decoder: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The input of the head, and the mean load-balancing loss of the layers."""
    angles, routing = rotary_angles(decoder, tokens.shape[1]), decoder.config.routing
    assert routing is not None, "the model has experts"

    def step(x: jax.Array, block: Block, layer: jax.Array, extra: None) -> tuple[jax.Array, jax.Array]:
        x, inputs = apply_layer(block, decoder.config, x, angles)
        mixture, rows = experts_of(block), inputs["mlp.up"].reshape(-1, x.shape[-1])
        _, chosen = experts.route(mixture, routing, rows)
        probabilities = jax.nn.softmax(rows @ mixture.router[...], axis=-1)
        count = probabilities.shape[-1]
        share = jnp.bincount(chosen.reshape(-1), length=count) / chosen.size
        return x, count * jnp.sum(jax.lax.stop_gradient(share) * probabilities.mean(0))

    x, balances = scan_layers(decoder.runs, step, embed(decoder, tokens))
    return finish(decoder, x), jnp.mean(jnp.concatenate(balances))


def train(ids: np.ndarray, check: Batches, steps: int, seed: int) -> Decoder:
    """Train with AdamW and a cosine schedule; returns the weights with the lowest perplexity on `check`."""
    config, sizes = parse(CONFIG, "the configuration")
    decoder: Any = initialise(build(config, sizes), jax.random.key(seed), deviation=0.04)
    print(f"{parameter_count(decoder):,} parameters, {len(ids):,} training tokens")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 2), steps, 1e-4)
    matrices_only = jax.tree.map(lambda leaf: leaf.ndim >= 3, decoder)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices_only)
    )

    def loss(decoder: Decoder, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, balance = hidden_and_balance(decoder, windows)
        value = jnp.mean(token_losses(decoder, hidden, windows))
        return value + BALANCE * balance, jnp.stack([value, balance])

    @jax.jit
    def step(decoder: Any, state: optax.OptState, windows: jax.Array) -> tuple[Any, optax.OptState, jax.Array]:
        (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(decoder, windows)
        updates, state = optimiser.update(gradient, state, decoder)
        return optax.apply_updates(decoder, updates), state, values

    state, rng, started = optimiser.init(decoder), np.random.default_rng(seed), time.perf_counter()
    best, best_decoder = float("inf"), decoder
    for number in range(1, steps + 1):
        decoder, state, values = step(decoder, state, jnp.asarray(draw_windows(ids, BATCH, rng)))
        if number % 100 == 0 or number == steps:
            checked = perplexity(decoder, check).perplexity
            seconds = time.perf_counter() - started
            print(
                f"step {number} loss {values[0]:.3f} balance {values[1]:.3f} check {checked:.2f} {seconds:.0f} s",
                flush=True,
            )
            if checked < best:
                best, best_decoder = checked, decoder
    return best_decoder


def main() -> None:
    """Train and write the model; print its perplexity on the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    ends = [len(text) * share // 20 for share in (18, 19)]
    training, checked, held_out = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
    with new_folder(arguments.output.with_name(arguments.output.name + "-tokenizer")) as folder:
        train_tokenizer(training, folder)
    folder = arguments.output.with_name(arguments.output.name + "-tokenizer")
    windows = [Batches(cut(Tokens(tokenise(part, folder), "part", 1), LENGTH)) for part in (checked, held_out)]
    decoder = train(tokenise(training, folder), windows[0], arguments.steps, arguments.seed)
    write_model(Model(decoder, CONFIG, folder, "the mixture of experts of bench/train_moe.py"), arguments.output)
    (arguments.output / "held_out.txt").write_text(held_out, encoding="utf-8")
    print(f"held out: {perplexity(decoder, windows[1])}")


if __name__ == "__main__":
    main()
