"""What people call an option that has another name here: names of other tools, and of the same meaning."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

SYNONYMS: Mapping[str, str] = {
    "sparsity": "--ratio",
    "pruning-ratio": "--ratio",
    "prune-ratio": "--ratio",
    "prune-rate": "--ratio",
    "pruning-rate": "--ratio",
    "pruning-level": "--ratio",
    "compression": "--ratio",
    "compression-ratio": "--ratio",
    "sparsity-ratio": "--ratio",
    "target-sparsity": "--ratio",
    "remove-ratio": "--ratio",
    "fraction": "--ratio",
    "percent": "--ratio",
    "percentage": "--ratio",
    "share": "--ratio",
    "amount": "--ratio",
    "data": "--calibration",
    "dataset": "--calibration",
    "calib": "--calibration",
    "calib-data": "--calibration",
    "calibration-data": "--calibration",
    "calibration-dataset": "--calibration",
    "calibration-text": "--calibration",
    "train-data": "--calibration",
    "text": "--calibration",
    "corpus": "--calibration",
    "o": "--output",
    "out": "--output",
    "save": "--output",
    "save-dir": "--output",
    "save-path": "--output",
    "save-model": "--output",
    "output-dir": "--output",
    "output-path": "--output",
    "output-folder": "--output",
    "nsamples": "--samples",
    "n-samples": "--samples",
    "num-samples": "--samples",
    "num-examples": "--samples",
    "calibration-samples": "--samples",
    "seqlen": "--seq-len",
    "max-length": "--seq-len",
    "max-seq-len": "--seq-len",
    "max-seq-length": "--seq-len",
    "sequence-length": "--seq-len",
    "context-length": "--seq-len",
    "block-size": "--seq-len",
    "method": "--criterion",
    "importance": "--criterion",
    "metric": "--criterion",
    "pruner-type": "--criterion",
    "prune-method": "--criterion",
    "pruning-method": "--criterion",
    "config": "--recipe",
    "settings": "--recipe",
    "params": "--target-params",
    "parameters": "--target-params",
    "max-params": "--target-params",
    "target-parameters": "--target-params",
    "target-size": "--target-params",
    "flops": "--target-macs",
    "target-flops": "--target-macs",
    "macs": "--target-macs",
    "max-memory": "--target-memory",
    "vram": "--target-memory",
    "granularity": "--structures",
    "structure": "--structures",
    "modules": "--structures",
    "prune-layers": "--layers",
    "skip-layers": "--layers",
    "iterations": "--rounds",
    "iterative-steps": "--rounds",
    "num-rounds": "--rounds",
    "steps": "--rounds",
    "round-to": "--round-width-to",
    "multiple-of": "--round-width-to",
    "channel-multiple": "--round-width-to",
    "head-multiple": "--round-heads-to",
    "percdamp": "--ridge",
    "damp": "--ridge",
    "damping": "--ridge",
    "dampening": "--ridge",
    "lambda": "--ridge",
    "regularization": "--ridge",
    "reconstruction": "--refit",
    "recovery": "--refit",
    "compensation": "--refit",
    "eps": "--epsilon",
    "num-directions": "--directions",
    "perturbations": "--directions",
    "device": "--mesh",
    "gpus": "--mesh",
    "num-gpus": "--mesh",
    "tensor-parallel": "--mesh",
    "precision": "--dtype",
    "torch-dtype": "--dtype",
    "data-type": "--dtype",
    "eval": "--evaluate",
    "eval-data": "--evaluate",
    "eval-text": "--evaluate",
    "test-data": "--evaluate",
    "random-seed": "--seed",
    "shard-size": "--max-shard-size",
    "resume": "--checkpoint",
    "branch": "--revision",
    "silent": "--quiet",
}

# Names of the opposite of an option, and how to come from one to the other.
OPPOSITES: Mapping[str, str] = dict.fromkeys(
    ("keep-ratio", "keep", "keep-rate", "density", "remaining-ratio", "retain-ratio", "retention"),
    "--ratio, which is the share to remove: 1 minus the share to keep",
)

# The names that another command gives to options of `prune`.
_ELSEWHERE: Mapping[str, str] = {"--calibration": "--text", "--evaluate": "--text", "--seq-len": "--window"}


def suggestion(wrong: str, flags: Iterable[str]) -> str | None:
    """The option that a wrong name probably means, by meaning first and by spelling second; None without one.

    Args:
      wrong: the name, with or without leading dashes.
      flags: the options of the command, with leading dashes.
    """
    known, name = list(flags), wrong.lstrip("-").replace("_", "-").lower()
    meant = SYNONYMS.get(name)
    if name in OPPOSITES and "--ratio" in known:
        return OPPOSITES[name]
    for flag in (meant, _ELSEWHERE.get(meant or f"--{name}")):
        if flag in known:
            return flag
    return next(iter(get_close_matches(f"--{name}", known, 1)), None)
