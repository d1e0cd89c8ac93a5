"""The model card that lies beside pruned weights: README.md with YAML front matter, as the Hub reads it."""

import json
import re

from minillm_jax.report.summary import FORMAT_WORDS, Figures, printable, recipe, rows, short_name

_STOCK = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

_PER_LAYER = """\
The layers are of unequal size, or of a shape that no class of transformers takes. The code that reads them lies beside
the weights:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

Where `minillm-jax` is installed, no remote code is needed:

```python
from convert import modeling_pruned
from transformers import AutoModelForCausalLM

modeling_pruned.register()
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

_FLAX = """\
The weights are an Orbax checkpoint:

```python
import minillm_jax

model = minillm_jax.load("path/to/this/folder")
```

For transformers, convert them first, `python -m convert to-torch path/to/this/folder path/to/torch`, and then:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/torch", trust_remote_code=True)
```
"""

# How each format is loaded; the last snippet leaves `model` for the one below.
LOADING = {"stock": _STOCK, "padded": _STOCK, "per-layer": _PER_LAYER, "flax": _FLAX}

# The settings of LLM-Pruner and MINI-LLM.
RECOVERY = """\
```python
import torch
from peft import LoraConfig, get_peft_model

settings = LoraConfig(
    r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
)
tuned = get_peft_model(model.train(), settings)
optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
for tokens in batches:  # your text: int64 token ids of shape [batch, length]
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
tuned.merge_and_unload().save_pretrained("recovered")
```
"""

_PADDED_NOTE = """
Padding stays zero only as long as nothing is trained: the merged model is dense, and its padding cannot be taken off
again. To recover a model that stays small, prune to the format `per-layer`.
"""


def card(figures: Figures) -> str:
    """The model card of a finished job (`figures.result_json`), as Markdown."""
    name, written = short_name(figures["base_model"]), figures["format"]
    parts = [
        _front_matter(name),
        f"# {code(name)}, pruned\n",
        f"{code(name)} made physically smaller by structured pruning with minillm-jax: whole {_structures(figures)} "
        "are gone, and what is left is dense. The biases and weaknesses of the base model remain, and its licence "
        "holds for these weights too.\n",
        "## Recipe\n",
        "".join(f"- {label}: {code(value)}\n" for label, value in [("base model", name), *recipe(figures)]),
        "## Figures\n",
        _table(figures),
        "MACs are multiply-accumulates of one forward pass; memory is that of the weights and of the keys and values. "
        "`report.html` shows the figures in pictures, `report.json` holds them all, and `pruning.json` lists what was "
        "kept.\n",
        "## Loading\n",
        f"Format {code(written)}: {FORMAT_WORDS[written]}.\n",
        LOADING[written],
        "## Recovery with LoRA\n",
        'With `pip install "minillm-jax[recover]"`:\n',
        RECOVERY + (_PADDED_NOTE if written == "padded" else ""),
    ]
    return "\n".join(parts)


def _structures(figures: Figures) -> str:
    words = {"heads": "attention heads", "channels": "MLP channels", "hidden": "hidden dimensions", "layers": "layers"}
    return " and ".join(words[structure] for structure in figures["settings"]["structures"])


def _front_matter(name: str) -> str:
    return f"---\nbase_model: {quoted(name)}\nlibrary_name: transformers\ntags:\n- pruned\n- minillm-jax\n---\n"


def _table(figures: Figures) -> str:
    lines = ["| | before | after | change |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in rows(figures)]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Any text as one YAML scalar; JSON strings are."""
    return json.dumps(printable(text), ensure_ascii=False)


def code(text: str) -> str:
    """Any text as one span of Markdown code: nothing in it is read as Markdown or HTML."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"
