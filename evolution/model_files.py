"""A model's weights in its directory, read one tensor at a time, and what each of them is to the model.

The directory is one that transformers' `save_pretrained` writes: `config.json` beside `model.safetensors`, whole or in
shards under an index. Names are those that the model itself gives its parameters; a file may use older ones. The model
is built on torch's meta device, which takes no memory, and no code of the directory ever runs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from evolution.errors import ExtractionError
from registry.peft_config import logical_base

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


class Weights(Protocol):
    """Tensors by the names of a model's parameters, of which nothing is held."""

    @property
    def names(self) -> Collection[str]:
        """Those that there are."""

    def tensor(self, name: str) -> torch.Tensor:
        """One of them, as it was stored."""


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """What a model's parameters are to it, all by their whole paths."""

    architecture: str
    linear: Mapping[str, bool]
    """Linear modules; whether the weight is stored as (d_in, d_out), which is Conv1D's way."""
    kinds: Mapping[str, str]
    """Parameter → embedding, norm, bias, weight (of a linear module) or other."""
    tied: Mapping[str, str]
    """Parameter → the one whose tensor it shares, which is the only one that counts."""


class ModelFiles:
    """The weights of one directory. A file is open for one tensor only: what is read of a mapped one stays resident."""

    def __init__(self, directory: Path) -> None:
        """Raises `ExtractionError` for a directory that holds no such model."""
        self.directory = directory
        self.name = logical_base(str(directory.resolve()))
        self._model = _skeleton(directory)
        self._places = self._found()

    @property
    def names(self) -> Collection[str]:
        """Every tensor in the files, parameter or not, but for those that share another's."""
        return self._places.keys()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it was stored. Raises `ExtractionError` for a damaged file."""
        return _read(*self._places[name])

    @cached_property
    def layout(self) -> ModelLayout:
        """What the model makes of them."""
        return layout_of(self._model)

    def _found(self) -> dict[str, tuple[Path, str]]:
        renamings = [one for one in get_model_conversion_mapping(self._model) if isinstance(one, WeightRenaming)]
        parameters, prefix = self._model.state_dict(), self._model.base_model_prefix
        found: dict[str, tuple[Path, str]] = {}
        for key, path in self._keys().items():
            name, _ = rename_source_key(key, renamings, [], prefix, parameters)
            found[name] = (path, key)
        for alias, source in self.layout.tied.items():
            place = found.pop(alias, None)
            if place and not torch.equal(_read(*place), _read(*found.setdefault(source, place))):
                raise ExtractionError(
                    f"expected {alias} to be {source}, to which config.json ties it, got another tensor",
                    hint="say tie_word_embeddings: false in config.json if the model was tuned untied",
                )
        return found

    def _keys(self) -> dict[str, Path]:
        """Keys in the files, and the file of each."""
        index = self.directory / INDEX
        if not index.exists():
            path = self.directory / WEIGHTS
            with _opened(path) as file:
                return dict.fromkeys(file.keys(), path)
        try:
            shards: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            odd = [shard for shard in shards.values() if Path(shard).name != shard]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(index, error) from error
        if odd:
            raise ExtractionError(f"expected shards in {self.directory} itself, got {odd[0]!r}")
        return {key: self.directory / shard for key, shard in shards.items()}


def _read(path: Path, key: str) -> torch.Tensor:
    with _opened(path) as file:
        tensor: torch.Tensor = file.get_tensor(key)
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file, its errors as `ExtractionError`."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise ExtractionError(
            f"expected {path.name} in {path.parent}, found none",
            hint="save the model with transformers' save_pretrained; pickled weights are not read",
        ) from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def layout_of(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model, which may lie on the meta device."""
    tied = dict(model.all_tied_weights_keys)
    linear: dict[str, bool] = {}
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".removeprefix(".")
            if name not in tied:
                kinds[name] = _kind(module, leaf)
        if kinds.get(f"{path}.weight") == "weight":
            linear[path] = isinstance(module, Conv1D)
    return ModelLayout(architecture=type(model).__name__, linear=linear, kinds=kinds, tied=tied)


def _kind(module: nn.Module, leaf: str) -> str:
    if leaf == "bias":
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear | Conv1D):
        return "weight"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _skeleton(directory: Path) -> PreTrainedModel:
    """The model without its weights."""
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ExtractionError(
            f"expected a model's config.json in {directory}, got none that transformers knows: {error}",
            hint="name the directory that save_pretrained wrote",
        ) from error
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ExtractionError(f"expected an architecture of transformers in {directory}, got {name}")
    with torch.device("meta"):
        model: PreTrainedModel = architecture(config)
    return model


def _damaged(path: Path, error: Exception) -> ExtractionError:
    return ExtractionError(f"{path} cannot be read: {error}", hint="download or save the model again")


__all__ = ["INDEX", "WEIGHTS", "ModelFiles", "ModelLayout", "Weights", "layout_of"]
