"""Reading a model from a Hugging Face folder, from a Flax checkpoint (Orbax) or from the Hub."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding

from convert import (
    companions,
    formats,
    found,
    fp8,
    gguf_folder,
    gguf_read,
    layers,
    memory,
    multimodal,
    mxfp4,
    official,
    rules,
    sources,
)
from convert.sources import FLOATS, read_json
from minillm_jax.data.tokenizer import quiet
from minillm_jax.devices.sharding import on_mesh, parts, shardings
from minillm_jax.errors import InputError, cause, reason, warn
from minillm_jax.model import axis_table, families
from minillm_jax.model.build import build
from minillm_jax.model.config import Sizes
from minillm_jax.model.decoder import Decoder
from minillm_jax.model.loaded import Model
from minillm_jax.model.tree import named_arrays
from minillm_jax.paths import local_path

CONFIG = "config.json"
FLAX_WEIGHTS = "flax_weights"
RECORD = "pruning.json"

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Description:
    """What the configuration and the headers of the weight files say of a model; no weight is read.

    Attributes:
      abstract: the decoder with `jax.ShapeDtypeStruct` leaves, in the stored type unless another one is asked for.
      sizes: the sizes of the decoder.
      raw_config: config.json, translated where the layout is an official one; with `text_config` and all other keys of
        a vision-language model.
      folder: the folder of config.json and the weight files.
      revision: the commit on the Hub, None for a local folder.
      layout: the official layout of a model whose code stands outside transformers.
    """

    abstract: Decoder
    sizes: Sizes
    raw_config: dict[str, Any]
    folder: Path
    revision: str | None
    layout: official.Layout | None = None


def describe_model(
    model: str | Path, dtype: str | None = None, revision: str | None = None, weights: bool = False
) -> Description:
    """Read the configuration of a model, and the type of its weights from the headers of the weight files.

    Args:
      model: as in `read_model`.
      dtype: type that the weights will be cast to; the stored type by default.
      revision: as in `read_model`.
      weights: download the weight files too, where the model is on the Hub.

    Raises:
      InputError: the folder does not exist, or its configuration is not supported.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype {dtype!r} is not supported; expected one of {', '.join(FLOATS.values())}")
    folder, commit = locate(model, revision, weights)
    stored_raw = _read_config(folder)
    layout = official.layout_of(stored_raw)
    raw = stored_raw if layout is None else _translated(layout, stored_raw, folder)
    text = raw if multimodal.kind_of(raw) is None else multimodal.text_config(raw, str(folder / CONFIG))
    config, sizes = families.parse(_complete(text, folder), str(folder / CONFIG))
    stored = dtype or sources.stored_type(folder) or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if stored not in FLOATS.values():
        stored = "float32"
    return Description(build(config, sizes, np.dtype(stored)), sizes, raw, folder, commit, layout)


def _translated(layout: official.Layout, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return layout.config(raw, str(folder / CONFIG))
    except KeyError as error:
        raise InputError(f"{folder / CONFIG}: the configuration lacks {error.args[0]}") from error


def kept_format(folder: Path) -> str | None:
    """The format in which a model that was read from a folder is written again; None where its shapes decide."""
    if (folder / gguf_read.WEIGHTS).is_file():
        return formats.GGUF
    return formats.FLAX if (folder / FLAX_WEIGHTS).is_dir() else None


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder whose weights are numbers, and not quantised."""
    if not os.path.lexists(folder / CONFIG) and (other := found.other_model(folder)) is not None:
        raise InputError(f"{folder / CONFIG}: the file is missing; {other}")
    raw = read_json(folder / CONFIG)
    method = found.quantisation(raw)
    # A model that was dequantised may keep the setting.
    if (
        method is not None
        and fp8.blocks_of(raw) is None
        and not mxfp4.is_mxfp4(raw)
        and not (sources.has_weights(folder) and sources.holds_floats(folder))
    ):
        raise InputError(f"{folder}: the weights are quantised ({method}); {found.dequantising(method)}")
    return raw


def read_model(
    model: str | Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    stream: bool = False,
) -> Model:
    """Load a model from a local folder or a Hub id.

    Args:
      model: a Hugging Face folder, a folder written by `python -m convert to-flax`, a GGUF file or the folder of one,
        or `owner/name` on the Hub.
      dtype: type that the weights are cast to, float32, bfloat16 or float16; the stored type by default.
      mesh: the devices that the weights are sharded over; one device by default.
      revision: branch, tag or commit on the Hub; the main branch by default.
      stream: leave the layers in the files, and read each when it is needed (`model.streamed`).

    Raises:
      InputError: the folder does not exist, its configuration is not supported, or its weights are damaged or do not
        match the configuration; or a Flax checkpoint is to be streamed.
    """
    described = describe_model(model, dtype, revision, weights=True)
    folder, abstract = described.folder, build(on_mesh(described.abstract.config, mesh), described.sizes)
    numpy_dtype = None if dtype is None else np.dtype(dtype)
    places = {} if mesh is None else shardings(abstract, mesh)
    if (folder / FLAX_WEIGHTS).is_dir():
        if stream:
            raise InputError(
                f"{model}: the layers of a Flax checkpoint cannot be read one at a time; convert it first with python "
                "-m convert to-torch"
            )
        decoder = _read_flax(abstract, folder / FLAX_WEIGHTS, numpy_dtype, places)
    else:
        source = _source(described, dtype)
        table = None if described.layout is None else described.layout.table
        if isinstance(source, gguf_read.GgufSource):
            source.warn_of_rounding()
            table = source.table
        read = layers.stream if stream else rules.fill
        decoder = read(abstract, source, numpy_dtype, places, table=table)
        decoder = decoder if described.layout is None else official.finish(decoder, read_json(folder / CONFIG))
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    return Model(decoder, described.raw_config, folder, str(model), record, described.revision)


def _source(described: Description, dtype: str | None) -> rules.TensorSource:
    """The tensors of a folder; those of quantised blocks are multiplied out in the type that is asked for."""
    folder, raw = described.folder, described.raw_config
    blocks, multiplied = fp8.blocks_of(raw), dtype or str(described.abstract.embedding.dtype)
    if sources.holds_floats(folder):
        source = sources.open_folder(folder)
    elif blocks is not None:
        source = fp8.BlockScaledFolder(folder, blocks, multiplied)
    else:
        source = mxfp4.Mxfp4Folder(folder, multiplied) if mxfp4.is_mxfp4(raw) else sources.open_folder(folder)
    if multimodal.rest_of(described.raw_config, folder) is None:  # which also checks the types of the rest
        return source
    return multimodal.TextSource(source)


def locate(model: str | Path, revision: str | None = None, weights: bool = True) -> tuple[Path, str | None]:
    """The local folder of a model; a model that is no local folder is downloaded from the Hub.

    A GGUF file becomes a temporary folder (`gguf_folder.unpack`), and so does a folder with one and no config.json.

    Args:
      model: a folder, a GGUF file or a Hub id.
      revision: branch, tag or commit on the Hub.
      weights: download the weight files, and not the configuration alone.

    Returns:
      The folder, and the commit on the Hub; None for a local folder.

    Raises:
      InputError: the folder does not exist, and the Hub cannot provide the model.
    """
    path, name = local_path(model, "model", hub=True), str(model)
    if os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises an error for a name that is too long
        if revision is not None:
            raise InputError(f"{name}: a local folder has no revisions; leave out --revision {revision}")
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{name}: the folder cannot be read (Permission denied)")
        file = gguf_folder.single_file(path)
        return (path if file is None else gguf_folder.unpack(file)), None
    if os.path.isfile(path):  # noqa: PTH113
        if gguf_folder.is_gguf(path):
            if revision is not None:
                raise InputError(f"{name}: a local file has no revisions; leave out --revision {revision}")
            return gguf_folder.unpack(path), None
        what = found.file_content(path) or found.OTHER_FORMATS.get(path.suffix.lower())
        hint = what if what and path.suffix != ".safetensors" else f"give the folder of the model, {path.parent}"
        raise InputError(f"{name}: a file, expected a folder with a {CONFIG}; {hint}")
    if os.path.exists(path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):  # noqa: PTH110
        raise InputError(f"{name}: no such folder; give a folder with a {CONFIG} or a Hub id like owner/name")
    try:
        folder = _download(name, revision, weights)
    except Exception as error:  # the Hub client raises errors of many types: offline, unknown, gated, ...
        reason = _hub_reason(error, name, revision)
        raise InputError(f"{name}: no such folder here, and the Hub could not provide it ({reason})") from error
    # The Hub's cache names the folder of a snapshot by its commit.
    return folder, folder.name if _COMMIT.fullmatch(folder.name) else None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """The folder of a model in the Hub's cache. PyTorch files are fetched only where a model has no other weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, ignore_patterns=list(companions.NOT_FETCHED)))
    except Exception as error:
        # The client says so where it is offline and its cache lacks some of the files, a licence for example.
        folder = Path(getattr(error, "snapshot_path", None) or "")
        if folder == Path() or not (folder / CONFIG).is_file():
            raise
        warn(f"{name}: the Hub cannot be reached, and its cache lacks some files beside the weights; they stay missing")
    # The weights come from the same commit, even if the branch has moved since.
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    if weights:
        kinds = [*sources.SAFETENSORS_FILES, f"{FLAX_WEIGHTS}/*"]
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=kinds))
        if not sources.has_safetensors(folder) and not (folder / FLAX_WEIGHTS).is_dir():
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=list(sources.TORCH_FILES)))
    return folder


def _hub_reason(error: Exception, name: str, revision: str | None) -> str:
    """Why the Hub cannot provide a model, and what helps; the client's own advice is for callers of its functions."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; accept the terms at https://huggingface.co/{name} and run hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private; check the name, or run hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no revision {revision}"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids a download, and the cache lacks the model; unset it, or give a local folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "no connection, and the cache lacks the model; check the connection, or give a local folder"
    return cause(error)


def _complete(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with transformers' defaults, and with old keys renamed to current ones (`rope_parameters`)."""
    from transformers import AutoConfig

    base = families.family_of(raw, str(folder / CONFIG))
    families.check_layer_count(raw, str(folder / CONFIG))
    stock_keys = {key: value for key, value in raw.items() if key not in ("auto_map", "per_layer_config")}
    unchanged = {"model_type": raw["model_type"], "per_layer_config": raw.get("per_layer_config")}
    try:
        if raw["model_type"] != base:
            # The stock class only fills in defaults here, and it refuses a hidden size that the heads do not divide.
            unchanged["hidden_size"] = raw["hidden_size"]
            stock_keys["hidden_size"] = raw[families.FAMILIES[base].heads] * raw["head_dim"]
        with quiet():
            stock = families.FAMILIES[base].defaults or base
            return AutoConfig.for_model(**stock_keys | {"model_type": stock}).to_dict() | unchanged
    except Exception as error:  # validation raises errors of many types
        raise InputError(f"{folder / CONFIG}: transformers rejects the configuration ({cause(error)})") from error


def _read_flax(abstract: Decoder, folder: Path, dtype: np.dtype | None, places: Mapping[str, NamedSharding]) -> Decoder:
    """Fill an abstract decoder from an Orbax checkpoint; `dtype` None keeps the stored types."""
    from orbax.checkpoint import v1 as ocp

    where = str(folder.resolve())
    try:
        stored = ocp.metadata(where).metadata
        _check_stored(abstract, stored, where)
        single = jax.device_put(0).sharding  # the default device

        def target(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
            place = places.get(axis_table.array_path(path), single)
            return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)

        targets = jax.tree_util.tree_map_with_path(target, stored)
        arrays = dict(named_arrays(ocp.load(where, targets)))
        kind = next(iter(arrays.values())).dtype
        arrays |= {path: jnp.zeros(leaf.shape, kind) for path, leaf in named_arrays(abstract) if not leaf.size}
    except InputError:
        raise
    except Exception as error:  # Orbax raises errors of many types for a damaged checkpoint
        raise InputError(f"{folder}: not a whole Orbax checkpoint ({reason(error)})") from error
    for path, array in arrays.items():
        for _, part in parts(array):
            memory.check_finite(part, path, where)
    return rules.fill_tree(abstract, arrays, places)


def _check_stored(abstract: Decoder, stored: Any, where: str) -> None:
    """Check that a checkpoint holds exactly the arrays of the configuration, with their shapes."""
    expected_shapes = {
        path: leaf.shape for path, leaf in named_arrays(abstract) if leaf.size and not axis_table.is_data(path)
    }
    stored_shapes = {path: leaf.shape for path, leaf in named_arrays(stored)}
    for path in sorted(expected_shapes.keys() | stored_shapes.keys()):
        if expected_shapes.get(path) != stored_shapes.get(path):
            raise InputError(
                f"{where}: array {path!r} has shape {stored_shapes.get(path, 'none: it is missing')}, "
                f"but the configuration expects {expected_shapes.get(path, 'no such array')}"
            )
