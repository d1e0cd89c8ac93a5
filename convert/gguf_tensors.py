"""The numbers of a GGUF tensor: decoded from its stored type, and encoded to one."""

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np

from convert import gguf_file, memory
from convert.gguf_file import Entry, GgufFile
from minillm_jax.errors import InputError, cause

# Types whose tensors hold plain numbers: name in GGUF -> name in NumPy.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The types of the matrices that are written, as llama.cpp's tools name them -> name in GGUF.
WRITTEN = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}

# Values that are decoded or encoded at once, so that the temporary arrays remain small.
AT_ONCE = 1 << 22


def decode(entry: Entry) -> np.ndarray:
    """The numbers of one stored tensor: in their own type where it is plain, else float32.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with entry.path.open("rb") as file:
            file.seek(entry.offset)
            data = np.fromfile(file, np.uint8, entry.size)
    except OSError as error:
        raise InputError(f"{entry.path}: cannot be read ({cause(error)})") from error
    if data.size < entry.size:
        raise InputError(f"{entry.path}: the file has become shorter while it was read")
    if entry.type in PLAIN:
        return data.view(PLAIN[entry.type]).reshape(entry.shape)
    gguf = gguf_file.import_gguf(entry.path)
    kind = gguf.GGMLQuantizationType[entry.type]
    rows = data.reshape(int(np.prod(entry.shape[:-1])), -1)
    tensor = np.empty((len(rows), entry.shape[-1]), np.float32)
    step = max(1, AT_ONCE // entry.shape[-1])
    for start in range(0, len(rows), step):
        tensor[start : start + step] = gguf.dequantize(rows[start : start + step], kind)
    return tensor.reshape(entry.shape)


def stored_type(file: GgufFile) -> str:
    """The type of the weights: that of all matrices where it is one of 16 bits, else float32, which holds every type.

    Vectors are float32 in most files, whatever the type of the matrices.
    """
    types = {PLAIN.get(entry.type, "float32") for entry in file.entries.values() if len(entry.shape) > 1}
    return types.pop() if len(types) == 1 else "float32"


def type_of(shape: tuple[int, ...], wanted: str) -> str:
    """The type that a tensor is stored in.

    Vectors are F32, because llama.cpp adds and multiplies by float32 vectors alone. Q8_0 has blocks of 32 values in a
    row; a matrix with other rows is F16.

    Args:
      shape: of the tensor.
      wanted: the type of the matrices, a name in GGUF.
    """
    if len(shape) < 2:
        return "F32"
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def size_of(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor in a type of `WRITTEN`."""
    count = int(np.prod(shape))
    return count // 32 * 34 if kind == "Q8_0" else count * np.dtype(PLAIN[kind]).itemsize


def encode(tensor: np.ndarray, kind: str, name: str, where: str) -> np.ndarray:
    """A tensor in a type of `WRITTEN`, contiguous.

    Args:
      tensor: the numbers.
      kind: name of the type in GGUF.
      name: of the tensor, for messages.
      where: the output, for messages.

    Raises:
      InputError: a value is out of the range of the type.
    """
    if kind in PLAIN:
        result = memory.aligned_empty(tensor.shape, np.dtype(PLAIN[kind]))
        memory.copy_layout(result, tensor)
        memory.check_finite(result, name, where, f" as {PLAIN[kind]}")
        return result
    gguf = gguf_file.import_gguf(where)
    rows = tensor.reshape(-1, tensor.shape[-1])
    result = np.empty((len(rows), tensor.shape[-1] // 32 * 34), np.uint8)
    step = max(1, AT_ONCE // tensor.shape[-1])
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32)
        result[start : start + step] = gguf.quantize(part, gguf.GGMLQuantizationType[kind])
    return result.reshape(*tensor.shape[:-1], -1)
