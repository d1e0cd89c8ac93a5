"""A pruned model as the draft of its parent in stock transformers: greedy decoding with and without `assistant_model`.

    python bench/draft.py DENSE PRUNED TEXT [--gamma 4] [--prompts 4] [--prompt-tokens 64] [--new-tokens 64]
        [--rounds 3] [--dtype float32] [--output bench/results/draft-MODEL.json]

The prompts are evenly spaced passages of the text. Both ways of decoding take turns, after one of each that does not
count. The seconds are those of `generate`, with the pass over the prompt; medians over all prompts and rounds. A
folder with unequal layers runs the code in it (`trust_remote_code`). The result also says whether transformers accepted
the pair, and on how many prompts the tokens were the same: in float32 all of them are, in bfloat16 rounding may decide
between two tokens.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from environment import environment
from transformers import AutoModelForCausalLM, AutoTokenizer


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def load(folder: str, dtype: str) -> Any:
    """A model of transformers in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=True).eval()


def draft_exactly(draft: Any, gamma: int) -> None:
    """Makes a model draft γ tokens in each round; by default, it stops early where it is not confident."""
    draft.generation_config.num_assistant_tokens = gamma
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0


def prompts_of(folder: str, text: str, count: int, length: int) -> list[torch.Tensor]:
    """Evenly spaced passages of a text, each [1, length]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < length:
        raise SystemExit(f"{text}: {len(ids)} tokens are less than one prompt of {length}")
    starts = np.linspace(0, len(ids) - length, count).astype(int).tolist()
    return [torch.tensor([ids[start : start + length]]) for start in starts]


def generate(model: Any, prompt: torch.Tensor, new_tokens: int, draft: Any = None) -> tuple[list[int], float]:
    """The new tokens of greedy decoding, and the seconds."""
    more = {} if draft is None else {"assistant_model": draft}
    started = time.perf_counter()
    with torch.no_grad():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            **more,
        )
    return found[0, prompt.shape[1] :].tolist(), time.perf_counter() - started


def measure(dense: Any, draft: Any, prompts: list[torch.Tensor], new_tokens: int, rounds: int) -> dict[str, Any]:
    """The measured numbers of one pair."""
    passes = Passes(dense)
    try:
        generate(dense, prompts[0], new_tokens, draft)
    except (ValueError, TypeError, RuntimeError) as error:
        return {"accepted_by_transformers": False, "error": str(error)}
    generate(dense, prompts[0], new_tokens)
    plain, drafted, same, in_passes = [], [], 0, 0
    for number in range(rounds):
        for prompt in prompts:
            alone, seconds = generate(dense, prompt, new_tokens)
            plain.append(seconds / len(alone))
            before = passes.count
            tokens, seconds = generate(dense, prompt, new_tokens, draft)
            drafted.append(seconds / len(tokens))
            in_passes += passes.count - before
            same += number == 0 and tokens == alone
    return {
        "accepted_by_transformers": True,
        "same": same,
        "tokens_per_pass": round(rounds * len(prompts) * new_tokens / in_passes, 3),
        "seconds_dense": median(plain),
        "seconds_draft": median(drafted),
        "speedup": round(median(plain) / median(drafted), 3),
    }


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("text")
    parser.add_argument("--gamma", type=int, default=4, help="drafted tokens of a round")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure one pair, print the row and write the JSON."""
    arguments = parse_arguments()
    dense, draft = (load(folder, arguments.dtype) for folder in (arguments.dense, arguments.pruned))
    draft_exactly(draft, arguments.gamma)
    prompts = prompts_of(arguments.dense, arguments.text, arguments.prompts, arguments.prompt_tokens)
    row = {
        "dense": Path(arguments.dense).name,
        "pruned": Path(arguments.pruned).name,
        "parameters": [sum(one.numel() for one in model.parameters()) for model in (dense, draft)],
        "text": Path(arguments.text).name,
        "gamma": arguments.gamma,
        "prompts": arguments.prompts,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "dtype": arguments.dtype,
        "torch": version("torch"),
        **measure(dense, draft, prompts, arguments.new_tokens, arguments.rounds),
    }
    print(json.dumps(row), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"environment": environment(), "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
