"""Train the bundled demo model on Python's reference manual, and write it as a Hugging Face folder.

    python bench/train_demo.py --output demo_model

The byte-level BPE tokenizer and the model are trained on the topics that are not held out (see `minillm_jax/demo.py`).
The last twentieth of the training tokens decides which checkpoint is written. The held-out topics are measured at the
end only.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from convert.writer import new_folder, write_model
from minillm_jax import demo
from minillm_jax.data.batches import Batches
from minillm_jax.data.text import Tokens, tokenise
from minillm_jax.data.windows import cut
from minillm_jax.evaluation.perplexity import perplexity
from minillm_jax.model.build import build, initialise
from minillm_jax.model.decoder import Decoder, final_hidden
from minillm_jax.model.families import parse
from minillm_jax.model.loaded import Model
from minillm_jax.model.loss import token_losses
from minillm_jax.model.tree import parameter_count

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 16,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}
BATCH, LENGTH = 16, 128

# A million parameters memorise the hundred thousand tokens of the manual within ten epochs. Random tokens in place of
# some inputs (never of targets) and a strong weight decay delay this.
REPLACED_INPUTS = 0.3
WEIGHT_DECAY = 1.0


def train_tokenizer(text: str, folder: Path) -> None:
    """Train a byte-level BPE tokenizer of the model's vocabulary size, and write its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written without transformers, because version 5 writes a class name that earlier versions do not know.
    settings = {"bos_token": "<|end|>", "eos_token": "<|end|>", "model_max_length": CONFIG["max_position_embeddings"]}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def draw_windows(ids: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Windows that start at random tokens of the text."""
    starts = rng.integers(0, len(ids) - LENGTH, count)
    return ids[starts[:, None] + np.arange(LENGTH)]


def train(ids: np.ndarray, check: Batches, steps: int, seed: int) -> Decoder:
    """Train with AdamW and a cosine schedule; returns the weights with the lowest perplexity on `check`."""
    config, sizes = parse(CONFIG, "the demo configuration")
    decoder: Any = initialise(build(config, sizes), jax.random.key(seed), deviation=0.04)
    print(f"{parameter_count(decoder):,} parameters, {len(ids):,} training tokens")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 2), steps, 1e-4)
    matrices_only = jax.tree.map(lambda leaf: leaf.ndim >= 3, decoder)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices_only)
    )
    state = optimiser.init(decoder)

    def loss(decoder: Decoder, windows: jax.Array, key: jax.Array) -> jax.Array:
        position_key, token_key = jax.random.split(key)
        random = jax.random.randint(token_key, windows.shape, 0, CONFIG["vocab_size"])
        inputs = jnp.where(jax.random.bernoulli(position_key, REPLACED_INPUTS, windows.shape), random, windows)
        return jnp.mean(token_losses(decoder, final_hidden(decoder, inputs), windows))

    @jax.jit
    def step(
        decoder: Any, state: optax.OptState, windows: jax.Array, key: jax.Array
    ) -> tuple[Any, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(decoder, windows, key)
        updates, state = optimiser.update(gradient, state, decoder)
        return optax.apply_updates(decoder, updates), state, value

    rng, started = np.random.default_rng(seed), time.perf_counter()
    best, best_decoder = float("inf"), decoder
    for number in range(1, steps + 1):
        key = jax.random.fold_in(jax.random.key(seed), number)
        decoder, state, value = step(decoder, state, jnp.asarray(draw_windows(ids, BATCH, rng)), key)
        if number % 100 == 0 or number == steps:
            checked = perplexity(decoder, check).perplexity
            print(
                f"step {number} loss {value:.3f} check {checked:.2f} {time.perf_counter() - started:.0f} s", flush=True
            )
            if checked < best:
                best, best_decoder = checked, decoder
    return best_decoder


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation of a prompt, by full forward passes of one fixed length."""
    ids = list(prompt)
    forward = jax.jit(lambda decoder, tokens: decoder(tokens))
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (len(prompt) + count - len(ids))])
        ids.append(int(jnp.argmax(forward(decoder, padded)[0, len(ids) - 1])))
    return ids


def main() -> None:
    """Train and write the model; print the numbers of its model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with new_folder(arguments.output.with_name(arguments.output.name + "-tokenizer")) as folder:
        train_tokenizer(demo.training_text(), folder)
    folder = arguments.output.with_name(arguments.output.name + "-tokenizer")
    ids = tokenise(demo.training_text(), folder)
    split = len(ids) * 19 // 20
    check = Batches(cut(Tokens(ids[split:], "check", 1), 128))
    decoder = train(ids[:split], check, arguments.steps, arguments.seed)
    write_model(Model(decoder, CONFIG, folder, "the demo model"), arguments.output)
    held_out = tokenise(demo.held_out_text(), folder)
    measured = perplexity(decoder, Batches(cut(Tokens(held_out, "held out", 1), 128)))
    prompt = tokenise("The following identifiers are", folder).tolist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    counts = np.bincount(ids, minlength=CONFIG["vocab_size"]) + 1
    unigram = float(np.exp(-np.mean(np.log(counts / counts.sum())[held_out])))
    sample = tokenizer.decode(greedy(decoder, prompt, 60))
    result = {"held_out": vars(measured), "unigram_perplexity": unigram, "sample": sample}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
