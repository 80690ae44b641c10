"""PEFT adapter directories in and out, without loss and without PEFT: `adapter_config.json` and raw safetensors.

What a card cannot hold is refused by name (`registry.peft_config`, `registry.peft_keys`). Files beside the two, such
as a README or a tokenizer, are no part of an adapter and are not looked at. See `docs/peft.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from registry.errors import CardFormatError, CardLimitError, RegistryError, UnsupportedAdapterError
from registry.files import written_whole
from registry.logs import get_logger
from registry.manifest import AdapterSpec, Manifest
from registry.peft_config import PeftSettings, config_of, logical_base
from registry.peft_keys import Layout, Place, keys_of, place_of
from registry.safetensors_file import RawTensor, read_tensors, write_tensors
from registry.tensor import Role, Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
FINAL_FOLDER = "final"
MAX_CONFIG_BYTES = 1 << 19
MAX_WEIGHTS_BYTES = 8 << 30
_METADATA = {"format": "pt"}
_BASE = "base_model_name_or_path"

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """What a directory holds; `config` is its config word for word, but for the base model's path: a logical id."""

    name: str
    spec: AdapterSpec
    tensors: tuple[Tensor, ...]
    base_name: str | None
    config: dict[str, Any]


def read(directory: Path) -> PeftAdapter:
    """Read an adapter directory, or a checkpoint root whose `final/` is one; the name is the given folder's.

    Raises `UnsupportedAdapterError` naming what a card cannot hold, `CardFormatError` for files that are missing,
    damaged or outside the directory, `CardLimitError` for files that are too large.
    """
    root = Path(os.path.abspath(directory))  # noqa: PTH100 (resolve() follows links, so it would change the name)
    home = _adapter_folder(root)
    config = _read_config(_file_in(home, CONFIG_FILE))
    settings = PeftSettings.parse(config)
    raw = _read_weights(home)
    layout = Layout.of_keys((tensor.key for tensor in raw), bias=settings.bias, saved_modules=settings.saved_modules)
    tensors = _place(raw, layout)
    spec = settings.resolve(layout)
    _check_modules(spec, tensors)
    base_name = logical_base(config.get(_BASE))
    return PeftAdapter(
        name=root.name,
        spec=spec,
        tensors=tuple(tensors.values()),
        base_name=base_name,
        config=config | {_BASE: base_name} if _BASE in config else config,
    )


def write(manifest: Manifest, tensors: Iterable[Tensor], directory: Path) -> None:
    """Write an adapter directory that PEFT loads; the config comes last, so a directory that has one is whole.

    A card that was made without PEFT gets a config from its `AdapterSpec`. Raises `RegistryError` where it cannot write
    or an adapter stands already, and `UnsupportedAdapterError` for a card whose `peft` settings contradict its own.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if os.path.lexists(directory / name):
            raise RegistryError(f"{directory / name} exists already", hint="name another directory, or remove it first")
    by_place = {Place(tensor.name, tensor.role): tensor for tensor in tensors}
    config, layout = _config_for(manifest, by_place)
    raw = [_raw(key, by_place[place]) for key, place in keys_of(by_place, layout)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with written_whole(directory / WEIGHTS_FILE) as file:
            write_tensors(file, raw, _METADATA)
        with written_whole(directory / CONFIG_FILE) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    except OSError as error:
        raise RegistryError(
            f"{directory} cannot be written: {error.strerror}", hint="name another directory"
        ) from error


def _adapter_folder(root: Path) -> Path:
    """The folder that holds the config: `root` or its `final/`."""
    final = root / FINAL_FOLDER
    if (root / CONFIG_FILE).exists() or not (final / CONFIG_FILE).exists():
        return root
    if not final.resolve().is_relative_to(root.resolve()):
        raise CardFormatError(f"{final} leads out of {root}", hint="import the directory that it leads to")
    return final


def _file_in(home: Path, name: str) -> Path:
    """The regular file `name` of `home`. A link may not leave `home`, except to the blobs of the Hugging Face cache."""
    try:
        path = (home / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CardFormatError(f"expected {name} in {home}, found none", hint=_hint_for_missing(home)) from error
    folder = home.resolve()
    allowed = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if not any(path.is_relative_to(place) for place in allowed):
        raise CardFormatError(
            f"{name} in {home} is a link to {path}, outside it", hint="copy with links resolved: cp -rL"
        )
    if not path.is_file():
        raise CardFormatError(f"expected {name} in {home} to be a regular file")
    if not os.access(path, os.R_OK):
        raise CardFormatError(f"{name} in {home} may not be read", hint="change its permissions")
    return path


def _hint_for_missing(home: Path) -> str:
    nested = sorted(path.parent.name for path in home.glob(f"*/{CONFIG_FILE}"))
    if nested:
        return f"these folders in it hold an adapter: {', '.join(nested[:5])}"
    return f"an adapter directory, as PEFT's save_pretrained writes it, holds {CONFIG_FILE} and {WEIGHTS_FILE}"


def _read_config(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise CardLimitError(f"expected at most {MAX_CONFIG_BYTES} bytes in {path.name}")
    try:
        config = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CardFormatError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CardFormatError(f"expected an object in {path.name}, got {type(config).__name__}")
    return config


def _read_weights(home: Path) -> tuple[RawTensor, ...]:
    if not os.path.lexists(home / WEIGHTS_FILE) and (home / PICKLE_FILE).exists():
        raise UnsupportedAdapterError(
            f"{home} has its weights in {PICKLE_FILE}, a pickle, which can run any code and is not read",
            hint="if you trust it: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors', metadata={'format': 'pt'})",
        )
    tensors, metadata = read_tensors(_file_in(home, WEIGHTS_FILE), max_bytes=MAX_WEIGHTS_BYTES)
    if metadata.keys() - _METADATA.keys():
        _log.warning("peft.metadata_ignored", file=WEIGHTS_FILE, keys=sorted(metadata.keys() - _METADATA.keys()))
    return tensors


def _place(raw: Iterable[RawTensor], layout: Layout) -> dict[Place, Tensor]:
    """Tensors by place. Where PEFT writes a tensor twice, it is kept once if both are the same."""
    tensors: dict[Place, Tensor] = {}
    keys: dict[str, Place] = {}
    for item in raw:
        place = place_of(item.key, layout)
        keys[item.key] = place
        tensor = Tensor.of(place.name, place.role, item.dtype, item.shape, item.data)
        first = tensors.setdefault(place, tensor)
        if first is not tensor and not _same(first, tensor):
            raise UnsupportedAdapterError(f"{item.key!r} and another key give {place.name!r} two different values")
    odd = sorted(keys.items() ^ set(keys_of(tensors, layout)))
    if odd:
        raise UnsupportedAdapterError(f"the key {odd[0][0]!r} would not come back from a card as it was")
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.data.tobytes() == other.data.tobytes()


def _check_modules(spec: AdapterSpec, tensors: Mapping[Place, Tensor]) -> None:
    if not spec.target_modules:
        raise UnsupportedAdapterError("the adapter has no LoRA weights, so there is nothing to make a card of")
    for module in spec.target_modules:
        roles = {Role.A, Role.B} | ({Role.MAGNITUDE} if spec.dora else set())
        missing = sorted(role for role in roles if Place(module, role) not in tensors)
        if missing:
            raise CardFormatError(f"module {module!r}: its {', '.join(missing)} is missing from {WEIGHTS_FILE}")
        if not spec.dora and Place(module, Role.MAGNITUDE) in tensors:
            raise CardFormatError(f"module {module!r} has a magnitude, but use_dora is false")
        _check_shapes(module, spec.rank_of(module), tensors[Place(module, Role.A)], tensors[Place(module, Role.B)])


def _check_shapes(module: str, rank: int, a: Tensor, b: Tensor) -> None:
    if len(a.shape) > 2:
        raise UnsupportedAdapterError(f"module {module!r} is a convolution (A is {a.shape}), which a card cannot hold")
    if len(a.shape) < 2 or 0 in a.shape + b.shape:
        raise CardFormatError(
            f"module {module!r}: A is {a.shape} and B is {b.shape}, so it was saved before its shards were gathered",
            hint="save it under deepspeed.zero.GatheredParameters or FSDP's summon_full_params",
        )
    if len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CardFormatError(
            f"module {module!r}: expected A ({rank}, d_in) and B (d_out, {rank}), got {a.shape} and {b.shape}, "
            "so r and rank_pattern do not fit the weights"
        )


def _config_for(manifest: Manifest, places: Iterable[Place]) -> tuple[dict[str, Any], Layout]:
    """The config to write, and the layout of keys that goes with it."""
    spec = manifest.adapter
    targets, embeddings = frozenset(spec.target_modules), frozenset(spec.embeddings)
    config = manifest.peft
    if config is None:
        full = {place.name.rpartition(".")[0] for place in places if place.role is Role.FULL}
        config = config_of(spec, saved_modules=full - targets, base_name=logical_base(manifest.base.name))
    settings = PeftSettings.parse(config)
    layout = Layout(bias=spec.bias, saved_modules=settings.saved_modules, targets=targets, embeddings=embeddings)
    described = settings.resolve(layout)
    odd = [field for field in AdapterSpec.model_fields if getattr(described, field) != getattr(spec, field)]
    if odd:
        raise UnsupportedAdapterError(f"the card's PEFT settings contradict the adapter in {', '.join(odd)}")
    return config, layout


def _raw(key: str, tensor: Tensor) -> RawTensor:
    plain = tensor if tensor.dtype.bits is None else Tensor.from_numpy(tensor.name, tensor.role, tensor.float32())
    return RawTensor(key=key, dtype=plain.dtype, shape=plain.shape, data=plain.data)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
