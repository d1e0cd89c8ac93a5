"""Published pruning tools of other authors, on the model and the windows of `bench/study.py`; a row in each process.

    python bench/study.py MODEL ... --recipes torch-pruning      # study.py calls this script

`torch-pruning` is the recipe of `examples/LLMs/prune_llm.py` of Torch-Pruning (https://github.com/VainF/Torch-Pruning):
the group's L2 norm as importance (mean over its layers), no global ranking, one ratio for hidden dimensions, channels
and heads, counts rounded down to multiples of 4, heads removed equally from every key/value head, key/value heads and
`lm_head`'s outputs kept, no calibration text. Four things differ from the example:

- the class `GroupNormImportance` is called `GroupMagnitudeImportance` in the installed version;
- transformers 5 has no `num_heads` on its modules: `num_key_value_groups` is computed from the shapes instead; and the
  graph is traced without a cache and through the eager attention, because the fused one hides how heads are shared;
- the weights are float32 and on the CPU;
- tied embeddings are tied again after pruning, and counted once.

The ratio is the smallest, to within 1/1024, whose model has at most the parameters of the target. It is found before
the measured process starts, and its search is not in the seconds. Version 1.6.1 builds the graph of a model with three
query heads for each key/value head; with two (stories260K), it did not end within a minute.
"""

import argparse
import json
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any

from processes import FLAG, cost, end_with_parent, launch

# Windows of one forward pass of the evaluation.
BATCH = 4

NOTE = (
    "examples/LLMs/prune_llm.py: magnitude, ratio {ratio:.4f} of hidden dimensions, channels and query heads, "
    "multiples of 4; key/value heads are kept; no calibration, no refit; torch-pruning {tool}, torch {torch}"
)


def load(folder: str) -> Any:
    """The model of a folder in float32; the dependency graph is traced through the eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()


def prune(model: Any, ratio: float) -> None:
    """Prune a Llama-like model in place."""
    import torch
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]  # installed for this benchmark alone

    config, heads = model.config, {}
    config.use_cache = False  # the graph follows tensors, which a cache is not
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.MetaPruner(
        model,
        example_inputs=torch.tensor([[1, 2, 3]]),
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=[model.lm_head],
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=4,
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for attention in attentions:
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def parameter_count(model: Any) -> int:
    """Number of parameters; tied embeddings count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def counts(model: Any) -> dict[str, list[int]]:
    """The number of hidden dimensions, and of heads and channels of every layer."""
    layers, size = model.model.layers, model.config.head_dim
    return {
        "hidden": [model.model.embed_tokens.weight.shape[1]],
        "query": [layer.self_attn.q_proj.out_features // size for layer in layers],
        "head": [layer.self_attn.k_proj.out_features // size for layer in layers],
        "channel": [layer.mlp.down_proj.in_features for layer in layers],
    }


def perplexity(model: Any, windows: Any) -> float:
    """Perplexity over windows of token ids [B, T]: T - 1 predictions a window, totals in float64."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for batch in torch.from_numpy(windows).long().split(BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")
            total += float(losses.double().sum())
    return exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def parameters_left(folder: str, ratio: float) -> int:
    """The parameters of the pruned model, from one layer with random weights: every layer keeps the same numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    model = AutoModelForCausalLM.from_config(config, dtype="float32", attn_implementation="eager").eval()
    prune(model, ratio)
    return parameter_count(model) + (layers - 1) * parameter_count(model.model.layers[0])


def ratio_for(folder: str, target: float, steps: int = 10) -> float:
    """The smallest ratio, to within 2 ** -steps, at which the pruned model has at most `target` parameters."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if parameters_left(folder, middle) <= target else (middle, high)
    return high


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """The measured process: load, prune, evaluate."""
    import time

    import numpy as np

    model = load(row["model"])
    start = time.perf_counter()
    prune(model, row["ratio"])
    seconds = time.perf_counter() - start
    with np.load(row["windows"]) as texts:
        measured = {name: perplexity(model, texts[name]) for name in texts.files}
    note = NOTE.format(ratio=row["ratio"], tool=version("torch-pruning"), torch=version("torch"))
    return {
        "parameters": parameter_count(model),
        "perplexity": measured,
        "pruning_seconds": round(seconds, 1),
        "counts": counts(model),
        "calibration_tokens": 0,
        "tokens_per_channel": 0.0,
        "note": note,
        **cost(),
    }


def main() -> None:
    """Measure the row of the command line, and print it; the ratio is found first where the row has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(FLAG, type=json.loads, required=True, help="the row, as JSON; bench/study.py writes it")
    row = parser.parse_args().row
    end_with_parent()
    if "ratio" in row:
        result = measure(row)
    else:
        result = launch(Path(__file__), row | {"ratio": ratio_for(row["model"], row["target"])})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
