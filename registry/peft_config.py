"""`adapter_config.json`: what each of PEFT's settings means for a card. Pure.

A setting is either held (`AdapterSpec` represents it), or carried (it matters to training or bookkeeping only, and
stays in the manifest word for word), or refused where its value changes what the adapter computes. A setting of a
newer PEFT is carried while it is off, and refused by name otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from registry.errors import CardFormatError, UnsupportedAdapterError
from registry.manifest import AdapterSpec
from registry.peft_keys import Layout

MAX_PATTERN_LENGTH = 512

HELD = frozenset(
    {
        *("alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "lora_alpha", "modules_to_save"),
        *("peft_type", "r", "rank_pattern", "use_dora", "use_rslora"),
    }
)
# Which modules are targets is read off the weights; what only an initialisation or a refused method uses says nothing.
CARRIED = frozenset(
    {
        *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
        *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
        *("lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
        *("target_modules", "task_type"),
    }
)
REFUSED = {
    "alora_invocation_tokens": "Activated LoRA applies only after its invocation tokens",
    "arrow_config": "Arrow routes between other adapters",
    "ensure_weight_tying": "PEFT does not save which modules it made one",
    "kasa_config": "KaSA truncates the base model's weights",
    "layer_replication": "it stacks the base model's layers anew",
    "lora_bias": "it adds a bias to B",
    "megatron_config": "its modules are Megatron's",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "it adapts parameters, not modules",
    "trainable_token_indices": "it replaces rows of an embedding",
    "use_bdlora": "its matrices are block-diagonal",
    "use_qalora": "QALoRA pools the inputs of A",
    "velora_config": "VeLoRA keeps a projection beside A and B",
}

# These leave the base model's weights alone; all others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them at load.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# A repeated group is how a regular expression comes to take exponential time; no module's name needs one.
_REPEATED_GROUP = re.compile(r"\)[*+{]")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The settings that a card holds, checked; patterns are still PEFT's regular expressions."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    scaling: Literal["lora", "rslora"]
    dora: bool
    bias: Literal["none", "all", "lora_only"]
    saved_modules: tuple[str, ...]
    fan_in_fan_out: bool
    targets: tuple[str, ...] | None
    """Names, if the config gives names: PEFT drops weights of any other module, and says nothing."""

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> PeftSettings:
        """Read a config. Raises `CardFormatError` for a malformed one, `UnsupportedAdapterError` naming the setting."""
        _check_supported(config)
        bias = config.get("bias", "none")
        if bias not in ("none", "all", "lora_only"):
            raise CardFormatError(f"bias: expected none, all or lora_only, got {bias!r}")
        return cls(
            rank=_rank("r", config.get("r", 8)),
            alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
            rank_pattern={key: _rank("rank_pattern", value) for key, value in _pattern("rank_pattern", config)},
            alpha_pattern={key: _alpha("alpha_pattern", value) for key, value in _pattern("alpha_pattern", config)},
            scaling="rslora" if _flag("use_rslora", config) else "lora",
            dora=_flag("use_dora", config),
            bias=bias,
            saved_modules=_names("modules_to_save", config),
            fan_in_fan_out=_flag("fan_in_fan_out", config),
            targets=_names("target_modules", config) if isinstance(config.get("target_modules"), list) else None,
        )

    def resolve(self, layout: Layout) -> AdapterSpec:
        """The adapter with patterns resolved to the full path of each module that has weights."""
        for module in sorted(layout.targets):
            self._check_target(module)
        ranks = {module: resolved(self.rank_pattern, module, self.rank) for module in sorted(layout.targets)}
        alphas = {module: resolved(self.alpha_pattern, module, self.alpha) for module in sorted(layout.targets)}
        try:
            return AdapterSpec(
                rank=self.rank,
                alpha=self.alpha,
                rank_pattern={module: rank for module, rank in ranks.items() if rank != self.rank},
                alpha_pattern={module: alpha for module, alpha in alphas.items() if alpha != self.alpha},
                scaling=self.scaling,
                dora=self.dora,
                bias=self.bias,
                target_modules=tuple(ranks),
                embeddings=tuple(sorted(layout.embeddings)),
                fan_in_fan_out=self.fan_in_fan_out,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise UnsupportedAdapterError(f"a card cannot hold this adapter's {place}: {first['msg']}") from error

    def _check_target(self, module: str) -> None:
        if self.targets is not None and not any(f".{module}".endswith(f".{name}") for name in self.targets):
            raise UnsupportedAdapterError(
                f"module {module!r} has weights but is not among target_modules, so PEFT would leave it out",
                hint="add it to target_modules in adapter_config.json, or remove its weights",
            )


def resolved(pattern: Mapping[str, _T], module: str, default: _T) -> _T:
    """The value at `module` as PEFT finds it (`get_pattern_key`): the first expression that fits the path's end.

    Raises `UnsupportedAdapterError` where the order decides and is not the sorted one: JSON objects have no order,
    and PEFT and the manifest both sort them when they write.
    """
    found = {key: value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)}
    if not found:
        return default
    value = next(iter(found.values()))
    if value != found[min(found)]:
        raise UnsupportedAdapterError(
            f"module {module!r} fits several patterns ({', '.join(found)}), and sorting them would change its value",
            hint="make the expressions of rank_pattern and alpha_pattern exclude each other",
        )
    return value


def logical_base(name: object) -> str | None:
    """The base model's id out of `base_model_name_or_path`: an id stays, a path is reduced to what names the model.

    A path of the Hugging Face cache gives `owner/model`, any other its last component. Decided by the text alone, so
    that every machine that imports the adapter makes the same card.
    """
    if not isinstance(name, str):
        return None
    segments = [segment for segment in re.split(r"[/\\]+", name.strip()) if segment not in ("", ".", "..", "~")]
    cached = [segment for segment in segments if segment.startswith("models--")]
    if cached and "snapshots" in segments:
        return cached[-1].removeprefix("models--").replace("--", "/", 1)
    is_path = re.match(r"[/\\.~]|[A-Za-z]:[/\\]", name.strip()) or len(segments) > 2 or "\\" in name
    return (segments[-1] if is_path else "/".join(segments)) if segments else None


def config_of(spec: AdapterSpec, *, saved_modules: Iterable[str], base_name: str | None) -> dict[str, Any]:
    """A config for an adapter that was made without PEFT; modules are given by their full paths."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": 0.0,
        "rank_pattern": {_exactly(module): rank for module, rank in spec.rank_pattern.items()},
        "alpha_pattern": {_exactly(module): _plain(alpha) for module, alpha in spec.alpha_pattern.items()},
        "target_modules": list(spec.target_modules),
        "modules_to_save": sorted(saved_modules) or None,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.dora,
        "bias": spec.bias,
        "fan_in_fan_out": spec.fan_in_fan_out,
    }


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(f"peft_type: expected LORA, got {kind!r}, and a card holds nothing else")
    for field, value in config.items():
        if field in HELD or field in CARRIED or value is None or value is False or value in ("", [], {}):
            continue
        reason = REFUSED.get(field, "this setting is unknown here, so what it changes is too")
        raise UnsupportedAdapterError(
            f"a card cannot hold {field}={str(value)[:80]}: {reason}",
            hint="train the adapter without it, or turn it off in adapter_config.json if it has no effect",
        )
    _check_init(config.get("init_lora_weights"))


def _check_init(init: object) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _HARMLESS_INITS):
        return
    raise UnsupportedAdapterError(
        f"a card cannot hold init_lora_weights={str(init)[:80]}: it changes the base model's weights at load",
        hint="save it as a plain LoRA: save_pretrained(…, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)",
    )


def _rank(field: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise CardFormatError(f"{field}: expected a rank of at least 1, got {str(value)[:80]!r}")
    return value


def _alpha(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or not isfinite(value):
        raise CardFormatError(f"{field}: expected a finite number, got {str(value)[:80]!r}")
    return float(value)


def _flag(field: str, config: Mapping[str, Any]) -> bool:
    value = config.get(field) or False
    if not isinstance(value, bool):
        raise CardFormatError(f"{field}: expected true or false, got {str(value)[:80]!r}")
    return value


def _pattern(field: str, config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise CardFormatError(f"{field}: expected an object, got {str(pattern)[:80]!r}")
    for key in pattern:
        _check_expression(field, key)
    return pattern.items()


def _check_expression(field: str, expression: str) -> None:
    if len(expression) > MAX_PATTERN_LENGTH or _REPEATED_GROUP.search(expression):
        raise UnsupportedAdapterError(
            f"{field}: {expression[:80]!r} is longer than {MAX_PATTERN_LENGTH} or repeats a group",
            hint="write it without a repeated group, so that it cannot take exponential time",
        )
    try:
        re.compile(expression)
    except re.error as error:
        raise CardFormatError(f"{field}: {expression!r} is not a regular expression: {error}") from error


def _names(field: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CardFormatError(f"{field}: expected a list of names, got {str(names)[:80]!r}")
    return tuple(names)


def _exactly(module: str) -> str:
    return f"^{re.escape(module)}"


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number
