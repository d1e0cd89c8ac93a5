"""The model card of pruned weights: README.md with YAML front matter, in the format of the Hugging Face Hub."""

import json
import re

from minillm_jax.report.summary import FORMAT_WORDS, Summary, printable, recipe, removed, rows, short_name, structures

_STOCK = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

_PER_LAYER = """\
The layers have unequal sizes, or a shape that no class of transformers accepts. This folder contains the code that
reads them:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

With `minillm-jax` installed, no remote code is needed:

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

For transformers, first convert the checkpoint with `python -m convert to-torch path/to/this/folder path/to/torch`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/torch", trust_remote_code=True)
```
"""

_GGUF = """\
The weights, the configuration and the tokenizer are one GGUF file, which llama.cpp reads:

```
llama-cli --model path/to/this/folder/model.gguf --prompt "Once upon a time"
```

For transformers, first convert the file with `python -m convert to-torch path/to/this/folder path/to/torch`:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/torch", trust_remote_code=True)
```
"""

CAUSAL = "AutoModelForCausalLM"

# The code that loads each format.
LOADING = {"stock": _STOCK, "padded": _STOCK, "per-layer": _PER_LAYER, "flax": _FLAX, "gguf": _GGUF}

_RECOVERY = """\
Training brings back a part of what pruning has cost: low-rank adapters, with the dense model as teacher.

```
minillm-jax recover path/to/this/folder --data text.txt --teacher {base} --output recovered
```
"""

_PADDED_NOTE = """
Training changes the zeros of the padding, so the merged model is dense and its padding cannot be removed. To recover a
model that remains small, {how}.
"""

_DRAFT = """\
This model has the vocabulary of the base model, so it can draft tokens for the base model in speculative decoding:
greedy decoding then gives the tokens of the base model, up to rounding. `minillm-jax compare` measures how many drafted
tokens are accepted and whether decoding becomes faster. In transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/the/base/model")
draft = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{remote})
inputs = AutoTokenizer.from_pretrained("path/to/the/base/model")("Once upon a time", return_tensors="pt")
model.generate(**inputs, assistant_model=draft, do_sample=False)
```

In vLLM (this command was not run with this model{note}):

```
vllm serve path/to/the/base/model{flag} --speculative-config \\
  '{{"model": "path/to/this/folder", "num_speculative_tokens": 4}}'
```
"""


def loading(summary: Summary) -> str:
    """The code that loads a written model, with the class of transformers that its configuration needs."""
    return LOADING[summary["format"]].replace(CAUSAL, summary.get("auto_class", CAUSAL))


def draft_section(form: str) -> list[str]:
    """The section on the model as a draft of its base model, with its heading.

    It is empty for formats that transformers does not load, or loads with padding. All other formats have the
    vocabulary of the base model: pruning removes no tokens.

    Args:
      form: the output format.
    """
    if form not in ("stock", "per-layer"):
        return []
    remote = form == "per-layer"
    return [
        "## Use as a draft\n",
        _DRAFT.format(
            remote=", trust_remote_code=True" if remote else "",
            note="; layers of unequal size need the code of this folder" if remote else "",
            flag=" --trust-remote-code" if remote else "",
        ),
    ]


def card(summary: Summary) -> str:
    """The model card of a finished job (`summary.result_json`), as Markdown."""
    name, form = short_name(summary["base_model"]), summary["format"]
    parts = [
        _front_matter(name, "gguf" if form == "gguf" else "transformers"),
        f"# {code(name)}, {removed(summary)}\n",
        f"minillm-jax made this model from {code(name)} by structured pruning: whole {structures(summary)} were "
        "removed from the weights, and the remaining weights are dense. The pruned model keeps the biases and "
        "weaknesses of the base model. The licence of the base model applies to these weights.\n",
        "## Recipe\n",
        "".join(f"- {label}: {code(value)}\n" for label, value in [("base model", name), *recipe(summary)]),
        *([f"{summary['few_tokens']}.\n"] if summary["few_tokens"] else []),
        "## Results\n",
        _table(summary),
        "MACs are the multiply-accumulates of one forward pass. Memory is that of the weights and of the keys and "
        "values. `report.html` shows plots, `report.json` holds all numbers, and `pruning.json` lists the kept "
        "groups.\n",
        "## Loading\n",
        f"Format {code(form)}: {FORMAT_WORDS[form]}.\n",
        loading(summary),
        *draft_section(form),
        "## Recovery\n",
        _RECOVERY.format(base="path/to/the/base/model") + _padded_note(summary),
    ]
    return "\n".join(parts)


def _padded_note(summary: Summary) -> str:
    if summary["format"] != "padded":
        return ""
    causal = summary.get("auto_class", CAUSAL) == CAUSAL
    return _PADDED_NOTE.format(how="prune to the format `per-layer`" if causal else "prune with `--allocation uniform`")


def _front_matter(name: str, library: str) -> str:
    return f"---\nbase_model: {quoted(name)}\nlibrary_name: {library}\ntags:\n- pruned\n- minillm-jax\n---\n"


def _table(summary: Summary) -> str:
    lines = ["| | before | after | change |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in rows(summary)]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """Any text as one YAML scalar: a JSON string is a YAML scalar."""
    return json.dumps(printable(text), ensure_ascii=False)


def code(text: str) -> str:
    """Any text as one span of Markdown code, in which no part of the text is Markdown or HTML."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"
