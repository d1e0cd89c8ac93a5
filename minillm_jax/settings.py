"""All settings of a pruning run, with their defaults: those of the recipe `ours`.

Each class is a section of a recipe. A field with an option is a flag of the command line, a keyword of `prune` in
Python, and a key of the section in TOML. Help, defaults and allowed words come from here and from nowhere else. This
module imports neither JAX nor transformers, so that `--help` answers at once.
"""

from dataclasses import dataclass, field

from minillm_jax.errors import InputError, one_of
from minillm_jax.options import BYTES, COUNT, LAYERS, SHARDS, STEP, WORDS, option

STRUCTURES = ("heads", "channels", "attention", "mlp", "experts", "expert-channels", "hidden", "layers")
# The structures of mixtures of experts: whole experts, and the channels inside all of them.
OF_EXPERTS = ("experts", "expert-channels")
# The structures that are whole sublayers.
SUBLAYERS = ("attention", "mlp")
# What other tools call these structures. The words are near, not equal: none of them is accepted.
MEANT = {
    **dict.fromkeys(("attn", "self-attention", "kv", "kv-heads", "head", "query", "queries"), "heads"),
    **dict.fromkeys(("ffn", "feed-forward", "feedforward", "intermediate", "neurons", "width", "channel"), "channels"),
    **dict.fromkeys(("embedding", "embeddings", "hidden-size", "hidden_size", "dim", "dims", "residual"), "hidden"),
    **dict.fromkeys(("depth", "block", "blocks", "layer"), "layers"),
    **dict.fromkeys(("expert", "moe", "ffn-experts"), "experts"),
}
HEADS = ("group", "query")
COUNTED = ("groups", "blocks", "model")
ALLOCATIONS = ("uniform", "equal", "global", "measured", "curves", "search")
# The allocations that measure losses on the calibration windows.
MEASURED = ("equal", "measured", "curves", "search")
# The allocations that follow the error curves of structured OBS.
BY_CURVES = ("equal", "curves", "search")
# The allocations that give every layer as many groups as the others.
SAME_IN_LAYERS = ("uniform", "equal")
CRITERIA = (
    "obs",
    "wanda",
    "flap",
    "fms",
    "magnitude",
    "magnitude-l1",
    "vector",
    "element-1",
    "element-2",
    "mixed",
    "gate",
    "gate-square",
    "random",
    "noise",
)
# How whole experts are chosen (`pruning.experts`).
EXPERT_CRITERIA = ("reap", "frequency", "expert-norm", "random")
FACTORS = ("magnitude", "activation", "gradient")
ACTIVATION_NORMS = ("l2", "rms", "mean-abs", "std", "none")
WITHIN = ("sum", "mean", "max", "l2", "vector", "standardised")
ACROSS = ("max", "sum", "mean", "prod", "last")
ESTIMATORS = ("spsa", "jvp", "exact")
SPACES = ("weights", "low-rank", "gates")
DISTRIBUTIONS = ("gaussian", "rademacher", "sphere")
# Named, because the default of `jax.random.key` is a setting of the process and would change the directions. Both give
# the same bits under vmap and on every mesh; JAX's `rbg` and `philox4x32` do not, or not yet.
RNGS = ("threefry2x32", "threefry4x32")
METHODS = ("least-squares", "bias", "none")
SOLVERS = ("host", "device")
# `auto` is the host where JAX runs on a CPU, and the device elsewhere.
SOLVER_CHOICES = ("auto", *SOLVERS)
FORMATS = ("stock", "per-layer", "padded", "flax", "gguf")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
# Where the beginning-of-sequence token stands; in the text of an evaluation also once, before the whole text.
BOS = ("auto", "yes", "no")
EVALUATION_BOS = ("auto", "yes", "text", "no")
# How a conversation is written for training: by the tokenizer's chat template where it has one, or by Alpaca's prompt.
TEMPLATES = ("auto", "alpaca")
# Tokens of a training sequence whose prediction the loss counts.
LOSS_ON = ("auto", "response", "all")
# One example a training sequence, or examples one after the other; conversations are padded and texts packed by `auto`.
PACKINGS = ("auto", "padded", "packed")
DTYPES = ("float32", "bfloat16", "float16")
# What other tools call these types.
DTYPE_SYNONYMS = {
    **dict.fromkeys(("fp32", "f32", "float", "single", "torch.float32", "torch.float"), "float32"),
    **dict.fromkeys(("bf16", "bfloat", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "torch.float16", "torch.half"), "float16"),
}


def dtype_name(text: str | None) -> str | None:
    """The type of `DTYPES` that a text is a spelling of; the text itself where it is none."""
    small = "" if text is None else text.strip().lower()
    name = DTYPE_SYNONYMS.get(small, small)
    return name if name in DTYPES else text


# Kinds of groups inside each layer, by the name of the structure and the way to count heads.
_KINDS = {"group": "head", "query": "query"}


@dataclass(frozen=True)
class Data:
    """The calibration text and the windows that are drawn from it.

    Attributes:
      calibration: a file, a Hub data set as `owner/name[/config][:split]`, or a mixture, `a.txt:0.7,b.jsonl:0.3`.
      samples: number of windows; None for as many as suit the model (`data.calibration_size`).
      seq_len: tokens of a window; None for the length that suits the model. MACs and memory are given for it too.
      seed: of the windows, the directions, and random scores.
      field: name of the field that holds the text of a row, in the calibration and the evaluation text alike.
      bos: where the beginning-of-sequence token stands in the calibration windows (`data.first_token`).
    """

    calibration: str | None = option(
        None,
        str,
        "Text, .json, .jsonl, .csv, .parquet or .npy (token ids) file, or a Hub data set OWNER/NAME[:SPLIT], to "
        "calibrate on; or several with weights, a.txt:0.7,b.jsonl:0.3.",
        common=True,
    )
    samples: int | None = option(
        None,
        int,
        "Number of calibration windows. If unset, they have 16 tokens for each channel of the widest MLP, and 8192 at "
        "least.",
    )
    seq_len: int | None = option(
        None,
        int,
        "Tokens of a calibration window; MACs and memory are given for it too. If unset, 128, 512 or 2048, by the "
        "width of the model.",
    )
    seed: int = option(0, int, "Seed of the calibration windows, directions, noise and random scores.")
    field: str = option("text", str, "Field that holds the text, in files of rows and Hub data sets.")
    bos: str = option(
        "auto",
        str,
        "Beginning-of-sequence token of calibration texts: between documents where the tokenizer puts one, and before "
        "every window of Gemma (auto); between documents and before every window (yes); or nowhere (no).",
        choices=BOS,
    )


@dataclass(frozen=True)
class Budget:
    """How much is removed, and where.

    Attributes:
      ratio: the share that is removed, in (0, 1); None with a target.
      ratio_of: what the ratio is a share of: the `groups` of every kind in every pruned layer; or the parameters of the
        `blocks` or of the whole `model`. Parameters are reached to within one step: one group, or one query head of
        every key/value head (`uniform`: one step in every layer).
      target_params: instead of a ratio, the largest number of parameters of the pruned model.
      target_macs: instead of a ratio, the most multiply-accumulates for one window.
      target_memory: instead of a ratio, the most bytes of the weights and of the keys and values of one window.
      allocation: how the budget is shared between layers: `uniform`, the same share of every kind in every layer;
        `equal`, as many heads and as many channels in every layer, of which kind more is removed being chosen by
        losses; `global`, the lowest scores per cost of the whole model; `measured`, the least sum of measured losses;
        `curves`, the same with losses from two measured levels and the errors of structured OBS; `search`, the counts
        of `curves` after steps between sublayers that lower the measured divergence of the whole model. None for
        `curves` where structured OBS chooses the groups, `equal` if the format `stock` is asked for too, and else
        `uniform`.
      structures: what is removed, some of `STRUCTURES`; layers first, then hidden dimensions, then experts and the
        channels inside them, then heads and channels.
      heads: what a head is: a key/value head with all its query heads (`group`), or a query head (`query`).
      layers: the first pruned layer and the one after the last, counted from the end where negative; None for all.
      rounds: number of rounds, each with new scores.
      round_heads_to: the number of kept heads of a pruned layer is a multiple of this, or all of them; of query heads,
        the number that every key/value head keeps. A share of the groups is rounded up; a target, and a share of the
        parameters, are kept, so that counts are rounded down where that is necessary. The allocations `global` and
        `measured` remove heads in blocks of this size.
      round_width_to: the same for channels; of hidden dimensions, the number that the model keeps; of channels inside
        experts, the number that every expert keeps.
      round_experts_to: the number of experts that every layer keeps is a multiple of this.
      keep_at_least: share of the groups of a layer that is always kept (not with a uniform share of the groups).
      window: tokens of the window that costs are given for; a run sets it to the length of a calibration window.
    """

    ratio: float | None = option(
        None, float, "Share of the heads and channels of every layer to remove, between 0 and 1.", common=True
    )
    ratio_of: str = option(
        "groups", str, "What the ratio is a share of: groups, or parameters of the blocks or model.", choices=COUNTED
    )
    target_params: float | int | None = option(
        None, str, "Instead of a ratio: keep at most this many parameters, 5.4B or 120M.", spelling=COUNT
    )
    target_macs: float | int | None = option(
        None, str, "Instead of a ratio: at most this many multiply-accumulates a window, 340G.", spelling=COUNT
    )
    target_memory: float | int | None = option(
        None, str, "Instead of a ratio: at most this much memory of weights, keys and values, 10GB.", spelling=BYTES
    )
    allocation: str | None = option(
        None,
        str,
        "How the budget is shared between layers and kinds; curves if unset, but equal for --format stock, and uniform "
        "for other criteria than obs.",
        flag="budget",
        aliases=("allocation",),
        choices=ALLOCATIONS,
        common=True,
    )
    structures: tuple[str, ...] = option(
        ("heads", "channels"),
        str,
        "What to remove, joined by commas: heads, channels, attention or mlp (whole sublayers), experts, "
        "expert-channels, hidden (dimensions), layers.",
        spelling=WORDS,
        common=True,
    )
    heads: str = option(
        "group", str, "Remove key/value heads with their query heads (group), or query heads alone.", choices=HEADS
    )
    layers: tuple[int, int] | None = option(
        None, str, "Prune layers A to B - 1 only; 4:-2 leaves the first four and the last two.", spelling=LAYERS
    )
    rounds: int = option(1, int, "Prune in this many rounds, with new scores in each.")
    round_heads_to: int = option(
        1, int, "Keep a multiple of this many heads (or query heads of a key/value head) in every pruned layer."
    )
    round_width_to: int = option(1, int, "Keep a multiple of this many channels in every pruned layer: 64, 128.")
    round_experts_to: int = option(1, int, "Keep a multiple of this many experts in every layer: 8, 16.")
    keep_at_least: float = option(0.1, float, "Share of the groups of every layer that an allocation always keeps.")
    window: int = 128

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of groups that are removed inside each layer: `head` or `query`, and `channel`."""
        heads = (_KINDS.get(self.heads, "head"),) if {"heads", "attention"} & set(self.structures) else ()
        return heads + (("channel",) if {"channels", "mlp"} & set(self.structures) else ())

    def single(self, kind: str) -> bool:
        """Whether single groups of a kind inside the layers are removed, and not whole sublayers only."""
        return ("channels" if kind == "channel" else "heads") in self.structures

    def whole(self, kind: str) -> bool:
        """Whether a layer may lose all its groups of a kind, a whole sublayer."""
        return ("mlp" if kind == "channel" else "attention") in self.structures

    @property
    def target(self) -> tuple[str, float | int] | None:
        """The measure of the target and the most that may be left; None with a ratio."""
        targets = {"parameters": self.target_params, "macs": self.target_macs, "memory": self.target_memory}
        given = [(measure, most) for measure, most in targets.items() if most is not None]
        return given[0] if given else None

    @property
    def measure(self) -> str:
        """The cost that the budget counts: parameters, but for targets in another measure."""
        return "parameters" if self.target is None else self.target[0]

    @property
    def uniform(self) -> bool:
        """Whether every pruned layer loses the same share of every kind of groups."""
        return self.allocation in (None, "uniform")

    @property
    def by_share(self) -> bool:
        """Whether every pruned layer loses the same share of its groups, so that the shapes alone decide."""
        return self.uniform and self.counts_groups

    @property
    def counts_groups(self) -> bool:
        """Whether the budget is a share of the groups, and not of their parameters or a target."""
        return self.target is None and self.ratio_of == "groups"

    def multiple(self, kind: str) -> int:
        """The number that the count of kept groups of a kind is rounded to a multiple of."""
        if kind == "expert":
            return self.round_experts_to
        return self.round_width_to if kind in ("channel", "expert_channel", "hidden") else self.round_heads_to

    @staticmethod
    def multiple_flag(kind: str) -> str:
        """The flag of `multiple`."""
        if kind == "expert":
            return "--round-experts-to"
        return "--round-width-to" if kind in ("channel", "expert_channel", "hidden") else "--round-heads-to"

    def check(self) -> None:
        """Check that the settings suit each other.

        Raises:
          InputError: they do not, or one is out of its range.
        """
        self._check_structures()
        self._check_amount()
        if self.allocation is not None:
            one_of("allocation", self.allocation, ALLOCATIONS)
        if self.kinds and self.rounds < 1:
            raise InputError(f"--rounds must be at least 1 round, found {self.rounds}")
        if "heads" in self.structures:
            self._check_multiple("heads", self.round_heads_to)
        if {"channels", "expert-channels", "hidden"} & set(self.structures):
            self._check_multiple("channels", self.round_width_to)
        if "experts" in self.structures:
            self._check_multiple("experts", self.round_experts_to)
        if not self.by_share and not 0 <= self.keep_at_least < 1:
            raise InputError(f"--keep-at-least must lie in [0, 1), found {self.keep_at_least:g}")
        if self.window < 1:
            raise InputError(f"the window that costs are for must have at least 1 token, found {self.window}")

    def _check_structures(self) -> None:
        for structure in self.structures:
            meant = MEANT.get(structure.strip().lower())
            if meant is not None:
                raise InputError(
                    f"unknown structure {structure!r}; expected one of {', '.join(STRUCTURES)}; did you mean {meant}?"
                )
            one_of("structure", structure, STRUCTURES)
        if not self.structures or len(set(self.structures)) < len(self.structures):
            raise InputError("--structures must name at least one structure, and each of them once")
        self._check_sublayers()
        if "heads" in self.structures:
            one_of("way to count heads", self.heads, HEADS)

    def _check_sublayers(self) -> None:
        sublayers = " and ".join(structure for structure in SUBLAYERS if structure in self.structures)
        if not sublayers:
            return
        if self.allocation in (None, *SAME_IN_LAYERS):
            raise InputError(
                f"--structures {sublayers} removes whole sublayers from some layers, but the allocation "
                f"{self.allocation or 'uniform'} takes the same share from every layer; use --budget curves or measured"
            )
        if "attention" in self.structures and self.heads != "group":
            raise InputError(
                "--structures attention removes key/value heads with their query heads, which --heads query keeps; "
                "leave out one of the two"
            )
        if self.rounds > 1:
            raise InputError(f"--structures {sublayers} removes whole sublayers at once; leave out --rounds")

    def _check_amount(self) -> None:
        targets = [self.target_params, self.target_macs, self.target_memory]
        if sum(target is not None for target in targets) > 1:
            raise InputError("give one target: --target-params, --target-macs or --target-memory")
        if (self.ratio is None) == (self.target is None):
            raise InputError("give a ratio or a target for the pruned model, one of the two")
        if self.ratio is None:
            return
        one_of("thing that the ratio counts", self.ratio_of, COUNTED)
        if not 0 < self.ratio < 1:
            near = f"; did you mean {self.ratio / 100:g}?" if 2 <= self.ratio < 100 else ""
            raise InputError(f"the ratio must lie between 0 and 1, both excluded, found {self.ratio:g}{near}")

    def _check_multiple(self, words: str, multiple: int) -> None:
        if multiple < 1:
            raise InputError(f"the number of kept {words} can be rounded to multiples of at least 1, not {multiple}")


@dataclass(frozen=True)
class Estimation:
    """How the gradient is estimated. The defaults are those of MINI-LLM.

    Attributes:
      estimator: `spsa` (two opposite steps), `jvp` (the exact directional derivative, forward mode) or `exact`
        (reverse mode: no directions, but the memory of back-propagation); None for the criterion's own.
      space: what a direction moves: `weights` (all block matrices), `low-rank` or `gates`; None for the criterion's
        own.
      directions: number P of random directions.
      epsilon: length ε of the step of `spsa`; None to choose it by comparison with the exact directional derivative.
      distribution: of a direction's entries: `gaussian`, `rademacher` (signs), or `sphere` (Gaussian, length √d).
      rank: rank of low-rank directions.
      per_sequence: a direction of its own for every window (gates only).
      directions_per_step: directions vmapped into one pass; None to choose by `memory`. It changes speed and memory,
        not the directions.
      memory: bytes that the estimate may use besides the model; None for all that is free (1 GiB on a CPU).
      rng: how random bits are made; another generator makes other directions.
      seed: decides the directions, bit for bit; a run sets it to `Data.seed`.
      curvature: also the mean square of the gradients of single windows (`exact` by weights only).
    """

    estimator: str | None = option(
        None,
        str,
        "Gradient by two opposite steps (spsa), forward mode (jvp), or reverse mode (exact).",
        aliases=("difference",),
        choices=ESTIMATORS,
    )
    space: str | None = option(
        None, str, "What a direction moves: weights or low-rank for fms, gates for gate.", choices=SPACES
    )
    directions: int = option(16, int, "Number of random directions of the gradient estimate.")
    epsilon: float | None = option(1e-3, str, "Step of spsa along a direction, or auto.", spelling=STEP)
    distribution: str = option("gaussian", str, "Distribution of a direction's entries.", choices=DISTRIBUTIONS)
    rank: int = option(1, int, "Rank of low-rank directions.")
    per_sequence: bool = option(False, bool, "Draw a direction of its own for every window (gates only).")
    directions_per_step: int | None = option(None, int, "Directions in one forward pass; by the free memory if unset.")
    memory: int | None = option(None, str, "Memory for the estimate besides the model, 2GB or 500MB.", spelling=BYTES)
    rng: str = option("threefry2x32", str, "Random generator; threefry4x32 is faster on CPUs.", choices=RNGS)
    seed: int = 0
    curvature: bool = False


@dataclass(frozen=True)
class Scoring:
    """How groups are scored.

    Attributes:
      criterion: one of `CRITERIA`. `obs` is structured OBS, which chooses groups while pruning; `noise` is fms with the
        gradient replaced by noise, its control.
      estimation: of the gradient, for the criteria that take one.
      activation_norm: norm of an input feature over all tokens; None for the criterion's own.
      within: reduction over the weights of a structure; None for the criterion's own.
      across: reduction over the structures of a group; None for the criterion's own.
      seed: of noise and random scores; a run sets it to `Data.seed`.
      factors: the factors of fms that are multiplied, of `FACTORS`; None for all.
      expert_criterion: one of `EXPERT_CRITERIA`: how whole experts are chosen.
      kinds: kinds of groups that are scored: `head` or `query`, and `channel`.
    """

    criterion: str = option(
        "obs",
        str,
        "How groups are chosen; noise and random are controls.",
        choices=CRITERIA,
        elsewhere={name: f"--structures experts --expert-criterion {name}" for name in EXPERT_CRITERIA[:-1]},
    )
    estimation: Estimation = field(default_factory=Estimation)
    activation_norm: str | None = option(
        None, str, "Norm of the input features; the criterion's own if unset.", choices=ACTIVATION_NORMS
    )
    within: str | None = option(
        None, str, "Reduction over the weights of a structure; the criterion's own if unset.", choices=WITHIN
    )
    across: str | None = option(
        None, str, "Reduction over the structures of a group; the criterion's own if unset.", choices=ACROSS
    )
    seed: int = 0
    factors: tuple[str, ...] | None = option(
        None, str, "Factors of fms, joined by commas: magnitude, activation, gradient; all if unset.", spelling=WORDS
    )
    expert_criterion: str = option(
        "reap", str, "How experts are chosen; frequency and random are controls.", choices=EXPERT_CRITERIA
    )
    kinds: tuple[str, ...] = ("head", "channel")


@dataclass(frozen=True)
class Refit:
    """How the kept weights make up for the removed ones.

    Attributes:
      method: `least-squares`, which refits output projections (and their biases); `bias`, which adds the mean output of
        the removed groups to the bias (FLAP, arXiv 2312.11983); or `none`.
      alpha: α, the target of the refit: 0 for the layer's own dense output, 1 for the dense residual stream. None for
        half-way with least squares, and for 0 with `bias` and in models with a norm between the projection and the
        residual sum (Gemma 2, GLM 4), where no output of the projection is known to close the gap.
      ridge: λ as a share of the mean diagonal of the Gram matrix; None (`auto`) for the one with which the refit of
        each projection to three quarters of the calibration windows predicts the others best.
      inputs: β, how far the matrices that read the residual stream are refitted to the pruned one, from 0 (not at all)
        to 1. None for half-way with least squares, and 0 with `bias`.
      solver: where linear systems are solved and OBS orders groups: `host` (NumPy, float64) or `device` (JAX, float32
        with refits refined in float64); `auto` for the host where JAX runs on a CPU, and the device elsewhere.
    """

    method: str = option(
        "least-squares",
        str,
        "How the kept output projections make up for removed groups.",
        flag="refit",
        aliases=("restoration",),
        choices=METHODS,
    )
    alpha: float | None = option(
        None,
        float,
        "What the refit aims for: 0 reproduces this layer's own dense output; 1 also corrects the error that earlier "
        "pruned layers left in the residual stream. Half-way if unset.",
    )
    ridge: float | None = option(
        None,
        str,
        "Ridge of the refit, as a share of the mean diagonal of the Gram matrix, or auto: chosen for every projection "
        "by calibration windows that are held out.",
        spelling=STEP,
    )
    inputs: float | None = option(
        None,
        float,
        "How far to refit the matrices that read the residual stream, from 0 to 1. Half-way if unset.",
        flag="refit_inputs",
        aliases=("inner",),
    )
    solver: str = option(
        "auto",
        str,
        "Solve on the host in float64, or on the device in float32 and refine in float64; auto: on the device of a GPU "
        "or TPU.",
        choices=SOLVER_CHOICES,
    )


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
      format: of the folder; None for the first of `stock` and `per-layer` that holds the shapes.
      max_shard_size: of the weight files.
      dtype: type of the weights, in memory and in the files; None for the stored type.
      checkpoint: folder of the gradient estimate, from which an interrupted run continues.
      gguf_type: type of the matrices in a GGUF file; None for that of the weights.
      stream: read one layer of the model at a time, and write each when it is finished.
    """

    format: str | None = option(
        None,
        str,
        "Format of the output folder; the first that holds the shapes if unset.",
        choices=FORMATS,
        common=True,
    )
    max_shard_size: str = option("5GB", str, "Size of the largest weight file, 5GB or 500MB.", spelling=SHARDS)
    dtype: str | None = option(
        None,
        str,
        "Type of the weights; the stored type if unset.",
        choices=DTYPES,
        synonyms=DTYPE_SYNONYMS,
        common=True,
    )
    checkpoint: str | None = option(
        None, str, "Folder for the gradient estimate, to continue from after an interruption.", recorded=False
    )
    gguf_type: str | None = option(
        None, str, "Type of the matrices in a GGUF file; that of the weights if unset.", choices=GGUF_TYPES
    )
    stream: bool = option(
        False,
        bool,
        "Read one layer of the model at a time, for models larger than the memory; done without asking for a model "
        "that does not fit.",
        recorded=False,
    )


@dataclass(frozen=True)
class Devices:
    """The devices and processes of a run.

    Attributes:
      mesh: `data=A,fsdp=B,model=C`, each 1 where it is left out; None or `auto` for one device.
      hosts: `auto`, or `ADDRESS:PORT,COUNT,NUMBER`; None for one process.
    """

    mesh: str | None = option(None, str, "Mesh of devices, data=2,model=4 or fsdp=8; one device if unset.")
    hosts: str | None = option(
        None, str, "Several processes: auto, or ADDRESS:PORT,COUNT,NUMBER (docs/scale.md).", recorded=False
    )


@dataclass(frozen=True)
class Evaluation:
    """The text that perplexity is measured on before and after pruning.

    Attributes:
      text: as `Data.calibration`; None to measure nothing.
      window: tokens of a window.
      continuations: number of texts that the dense and the pruned model write for the report.
    """

    text: str | None = option(
        None, str, "Text to measure the perplexity on, before and after pruning.", flag="evaluate", common=True
    )
    window: int = option(128, int, "Tokens of an evaluation window.")
    continuations: int = option(
        3, int, "Beginnings of the evaluation text that all models continue, for the report; 0 for none."
    )


def check_continuations(count: int) -> None:
    """Checks the number of texts for the report.

    Raises:
      InputError: it is negative.
    """
    if count < 0:
        raise InputError(f"--continuations must be at least 0, found {count}")


@dataclass(frozen=True)
class Comparing:
    """What `compare` measures beside the changes of the next-token probabilities.

    Attributes:
      window: tokens of a window.
      windows: most windows, evenly spaced over the text; None for all.
      draft: number of tokens that a pruned model drafts for one pass of the dense model; 0 for no drafting.
      prompts: most prompts of the drafting: the first halves of evenly spaced windows.
      new_tokens: tokens that are decoded behind each prompt.
    """

    window: int = 128
    windows: int | None = None
    draft: int = 4
    prompts: int = 8
    new_tokens: int = 64

    def check(self) -> None:
        """Checks the numbers.

        Raises:
          InputError: one is out of its range.
        """
        least = {"windows": 1, "draft": 0, "prompts": 1, "new_tokens": 1}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise InputError(f"--{name.replace('_', '-')} must be at least {number}, found {value}")
