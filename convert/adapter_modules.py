"""The modules that PEFT adapts in the layers of a model: linear modules, and the parameters that hold all experts.

PEFT stores two matrices for a linear module W [outputs, inputs]: A [r, inputs] and B [outputs, r]. The rule of W is the
rule of A with the rank in the place of the outputs, and the rule of B with the rank in the place of the inputs.

transformers 5 holds the experts of a layer in two parameters, `gate_up_proj` and `down_proj`, which PEFT adapts by
`target_parameters` (`peft.tuners.lora.layer.ParamWrapper`). Its A [X * r, inputs] has the ranks of an expert one below
the other, its B [outputs, r * X] those of all experts side by side for each rank. Both are so for either orientation of
the parameter. PEFT wraps the module of the experts once for each adapted parameter: the last wrapper has the name of
the module, the one inside it `base_layer`.

Each matrix of ours has its own factors, even where the family stores several matrices as one fused module. The A of the
module then holds the A's of its parts, one below the other. Its B is zero where the rows of one part meet the A of
another part, so the product is that of the separate factors. PEFT joins the adapters of gate and up, which
transformers 4 held apart, in the same way (`peft.utils.transformers_weight_conversion`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convert import rules
from convert.families import Part, Rule
from convert.rules import Binding
from minillm_jax.model import axis_table
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.modules import depth, run_letters

# The module of the experts in a layer, in all classes of transformers 5, and its parameters in their order.
_EXPERTS = "mlp.experts"
_PARAMETERS = {"gate_up_proj": ("experts.gate", "experts.up"), "down_proj": ("experts.down",)}

# A [*inputs, R] and B [R, *outputs] of one layer, in the layout of the decoder; of experts, with the axis X in front.
Pair = tuple[np.ndarray, np.ndarray]


# -------------------------------------------------------------------------------------------------- linear modules


def _as_parameter(decoder: Decoder, binding: Binding) -> bool:
    """Whether `target_parameters` names the weight of a linear module.

    PEFT takes `gate_proj`, `up_proj` and `down_proj` in the `target_modules` of a mixture for the experts, as
    transformers 4 named them. Those of shared experts and dense layers are named as parameters; PEFT computes the same.
    """
    return decoder.config.routing is not None and binding.rule.parts[0].path.startswith("mlp.")


@dataclass(frozen=True)
class LinearModule:
    """A `torch.nn.Linear` of one layer.

    Attributes:
      binding: of its weight.
      parameter: whether the settings name it in `target_parameters`, in the place of `target_modules`.
    """

    binding: Binding
    parameter: bool = False

    @property
    def name(self) -> str:
        """Its name in the settings of PEFT."""
        return self.prefix + (".weight" if self.parameter else "")

    @property
    def short(self) -> str:
        """The part of the name inside the layer."""
        return self.binding.rule.name.removesuffix("" if self.parameter else ".weight")

    @property
    def prefix(self) -> str:
        """The prefix of the names of its two tensors."""
        return self.binding.name.removesuffix(".weight")

    @property
    def run(self) -> int:
        """The run of its layer."""
        return int(self.binding.paths[0].split(".")[1])

    @property
    def index(self) -> int:
        """Index of the layer in its run."""
        assert self.binding.index is not None, "the module stands in a layer"
        return self.binding.index

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of our matrices in it."""
        return tuple(map(_matrix, self.binding.rule.parts))

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B at a rank."""
        outputs, inputs = self.binding.stored_shape()
        return (rank, inputs), (outputs, rank)

    def stored(self, factors: Mapping[str, Pair]) -> Pair:
        """A and B, made of the factors of some of the matrices."""
        binding = self.binding
        adapted = [part for part in binding.rule.parts if _matrix(part) in factors]
        ranks = [factors[_matrix(part)][0].shape[-1] for part in adapted]
        total, first, rows, blocks = sum(ranks), 0, [], {}
        for part, rank in zip(adapted, ranks, strict=True):
            a, b = factors[_matrix(part)]
            bound = _binding_a(binding, part, rank)
            rows.append(bound.to_torch([a.reshape(_part_shape(bound, part)).astype(np.float32)]))
            blocks[part] = (slice(first, first + rank), b)
            first += rank
        bound, columns = _binding_b(binding, total), []
        for part in binding.rule.parts:
            shape = _part_shape(bound, part)
            columns.append(np.zeros(shape, np.float32))
            if part in blocks:
                block, b = blocks[part]
                columns[-1][block] = b.reshape(-1, *shape[1:])
        return np.concatenate(rows), bound.to_torch(columns)

    def separate(self, a: np.ndarray, b: np.ndarray, rank: int) -> dict[str, Pair]:
        """The factors of each matrix of ours.

        Args:
          a: A.
          b: B.
          rank: rank of the adapter, which `stored` gives to each part of a fused module.
        """
        total, parts = len(a), self.binding.rule.parts
        columns = _binding_b(self.binding, total).to_flax(b)
        pairs = {}
        for part, column, kept in zip(parts, columns, _kept_ranks(columns, rank), strict=True):
            inputs = len(_inputs_and_outputs(part)[0])
            outputs = _part_shape(self.binding, part)[inputs:]
            bound = _binding_a(self.binding, part, total)
            whole = bound.to_flax(a)[0].reshape(*_part_shape(self.binding, part)[:inputs], total)
            if kept.size:
                pairs[_matrix(part)] = (whole[..., kept], column.reshape(total, *outputs)[kept])
        return pairs


def _matrix(part: Part) -> str:
    """The name of a matrix of ours, `attention.q`."""
    return part.path.removesuffix(".kernel")


def _inputs_and_outputs(part: Part) -> list[str]:
    return axis_table.BLOCK_AXES[part.path].split()


def _with_rank(binding: Binding, letters: str, rank: int) -> Binding:
    """A binding in which some axes have the size of the rank: the first that of the rank, all others size 1."""
    return replace(binding, sizes=binding.sizes | dict.fromkeys(letters, 1) | {letters[0]: rank})


def _binding_a(binding: Binding, part: Part, rank: int) -> Binding:
    """The binding of one part's A, stored [rank, inputs]."""
    rule = Rule(binding.rule.name, (part,))
    return replace(_with_rank(binding, _inputs_and_outputs(part)[1], rank), rule=rule)


def _binding_b(binding: Binding, rank: int) -> Binding:
    """The binding of a module's B, stored [outputs of all parts, rank]. All parts have the same inputs."""
    return _with_rank(binding, _inputs_and_outputs(binding.rule.parts[0])[0], rank)


def _part_shape(binding: Binding, part: Part) -> tuple[int, ...]:
    return axis_table.shape(axis_table.BLOCK_AXES[part.path], binding.sizes)


def _kept_ranks(columns: Sequence[np.ndarray], rank: int) -> list[np.ndarray]:
    """The indices of the ranks that each part of a module keeps, without those in which the part's B is zero.

    Where the parts have equal ranks, one after the other, they keep all of their own, even if some are zero.
    """
    count, total = len(columns), len(columns[0])
    indices = np.arange(total)
    used = np.stack([column.reshape(total, -1).any(1) for column in columns])
    own = indices // rank == np.arange(count)[:, None]
    if total == rank * count and not (used & ~own).any():
        return [indices[row] for row in own]
    return [indices[row] for row in used] if count > 1 and used.any() else [indices] * count


# --------------------------------------------------------------------------------------------------------- experts


@dataclass(frozen=True)
class _Experts:
    """The experts of one layer.

    Attributes:
      layer: prefix of the names of the layer.
      run: the run of the layer.
      index: of the layer in its run.
      sizes: axis letter → size.
      alternating: whether the outputs of gate and up alternate.
    """

    layer: str
    run: int
    index: int
    sizes: Mapping[str, int]
    alternating: bool


def _experts(decoder: Decoder) -> list[_Experts]:
    """The layers with experts."""
    table, found, layer = rules.table_of(decoder), [], 0
    alternating = any(rule.alternating for rule in table.block)
    for run, block in enumerate(decoder.runs):
        sizes = run_letters(block)
        for index in range(depth(block)):
            if sizes["X"] and sizes["W"]:
                found.append(_Experts(table.layer.format(layer=layer), run, index, sizes, alternating))
            layer += 1
    return found


def _nested(experts: _Experts, named: Callable[[str, Sequence[str]], bool]) -> list["ExpertParameter"]:
    """The parameters of a layer that an adapter names. PEFT wraps them in their order."""
    names = [one for one, matrices in _PARAMETERS.items() if named(f"{experts.layer}{_EXPERTS}.{one}", matrices)]
    return [ExpertParameter(experts, one, len(names) - 1 - place) for place, one in enumerate(names)]


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter that holds one or two matrices of every expert of a layer; its methods are those of `LinearModule`.

    Attributes:
      experts: the experts of the layer.
      leaf: name of the parameter.
      inside: number of wrappers around its own.
    """

    experts: _Experts
    leaf: str
    inside: int
    parameter: bool = True

    @property
    def name(self) -> str:
        """See `LinearModule`."""
        return f"{self.experts.layer}{self.short}"

    @property
    def short(self) -> str:
        """See `LinearModule`."""
        return f"{_EXPERTS}.{self.leaf}"

    @property
    def prefix(self) -> str:
        """See `LinearModule`."""
        return f"{self.experts.layer}{_EXPERTS}" + ".base_layer" * self.inside

    @property
    def run(self) -> int:
        """See `LinearModule`."""
        return self.experts.run

    @property
    def index(self) -> int:
        """See `LinearModule`."""
        return self.experts.index

    @property
    def matrices(self) -> tuple[str, ...]:
        """See `LinearModule`."""
        return _PARAMETERS[self.leaf]

    def _sizes(self) -> tuple[int, int, int]:
        """The numbers of experts, of the inputs and of the outputs of one matrix."""
        x, inputs, outputs = axis_table.expert_matrices()[self.matrices[0]].split()
        return self.experts.sizes[x], self.experts.sizes[inputs], self.experts.sizes[outputs]

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """See `LinearModule`."""
        count, inputs, outputs = self._sizes()
        return (count * rank, inputs), (len(self.matrices) * outputs, rank * count)

    def _outputs(self, b: np.ndarray) -> list[np.ndarray]:
        """The views of the outputs of each matrix, of an array [outputs, ...]."""
        count = len(self.matrices)
        return [b[start::count] for start in range(count)] if self.experts.alternating else np.split(b, count)

    def stored(self, factors: Mapping[str, Pair]) -> Pair:
        """See `LinearModule`."""
        adapted = [name for name in self.matrices if name in factors]
        a = np.concatenate([factors[name][0] for name in adapted], axis=-1).swapaxes(1, 2)
        count, rank, inputs = a.shape
        b, first = np.zeros((self.shapes(rank)[1][0], rank, count), np.float32), 0
        for name, outputs in zip(self.matrices, self._outputs(b), strict=True):
            if name in factors:
                own = factors[name][1].transpose(2, 1, 0)
                outputs[:, first : first + own.shape[1]] = own
                first += own.shape[1]
        return np.ascontiguousarray(a.reshape(count * rank, inputs), np.float32), b.reshape(len(b), rank * count)

    def separate(self, a: np.ndarray, b: np.ndarray, rank: int) -> dict[str, Pair]:
        """See `LinearModule`."""
        count, inputs, _ = self._sizes()
        whole = a.reshape(count, -1, inputs).swapaxes(1, 2)
        parts = [outputs.transpose(1, 2, 0) for outputs in self._outputs(b.reshape(len(b), -1, count))]  # [r, X, O]
        return {
            name: (whole[..., kept], part[kept].swapaxes(0, 1))
            for name, part, kept in zip(self.matrices, parts, _kept_ranks(parts, rank), strict=True)
            if kept.size
        }


# ------------------------------------------------------------------------------------------------------------- both

# A module of one layer with an A and a B.
Module = LinearModule | ExpertParameter


def modules(decoder: Decoder, named: Callable[[str, Sequence[str]], bool]) -> list[Module]:
    """All modules in the layers; modules without inputs or outputs included.

    Args:
      decoder: the model; it may be abstract.
      named: name of a parameter of experts, and our matrices in it -> whether the adapter has factors for it.
    """
    kernels = [binding for binding in rules.bindings(decoder) if binding.index is not None]
    found: list[Module] = [
        LinearModule(binding, _as_parameter(decoder, binding))
        for binding in kernels
        if all(part.path.endswith(".kernel") for part in binding.rule.parts)
    ]
    return found + [module for layer in _experts(decoder) for module in _nested(layer, named)]
