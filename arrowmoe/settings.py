"""Settings of a node and of the command line: flags > `ARROWMOE_*` variables > a TOML or YAML file > defaults.

The layers are merged here rather than inside pydantic-settings, so that each value knows its source: `config show`
prints it, and an error names it. All errors are reported at once. Settings end at constructors: no module reads them.
"""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    StringConstraints,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

import arrowmoe
from arrowmoe.setting_groups import (
    EngineSettings,
    EvolutionSettings,
    LogSettings,
    Names,
    RouterSettings,
    SyncSettings,
    TeacherSettings,
    TrustSettings,
    listed,
)
from registry.errors import ArrowMoEError
from registry.urls import shown

PREFIX = "ARROWMOE_"
CONFIG_VARIABLE = "ARROWMOE_CONFIG"
DEBUG_VARIABLE = "ARROWMOE_DEBUG"
CONFIG_NAMES = ("config.toml", "config.yaml", "config.yml")
DEFAULT = "default"
_FLAGS = {"peers": "peer", "bases": "base", "discovery": "no-discovery", "sync.auto": "auto-sync"}


class ConfigurationError(ArrowMoEError):
    """Settings are wrong; the message lists every one of them with its source."""


def _address(text: str) -> str:
    try:
        arrowmoe.parse_address(text)
    except ArrowMoEError as error:
        raise ValueError(str(error)) from error
    return text


def _said(path: Any) -> Any:
    if path == "":  # as a path it would be the working directory
        raise ValueError("expected a directory, got an empty word")
    return path


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


AbsolutePath = Annotated[Path, BeforeValidator(_said), AfterValidator(_absolute)]
SecretUrl = Annotated[
    SecretStr, PlainSerializer(lambda url: shown(url.get_secret_value()), return_type=str, when_used="json")
]
"""A URL that may hold a password; shown without it."""
Address = Annotated[str, AfterValidator(_address)]
Peers = Annotated[tuple[Address, ...], NoDecode, BeforeValidator(listed)]
NodeName = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Settings(BaseSettings):
    """All settings; `Settings(...)` takes what is given, then defaults, and `load` reads the environment and files."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__")

    home: AbsolutePath = Field(
        default_factory=lambda: platformdirs.user_data_path("arrowmoe"), description="identity, cards and catalog"
    )
    catalog_url: SecretUrl = Field(
        default=SecretStr(""), description="database of the catalog; empty: an SQLite file in the home"
    )
    blobs_url: SecretUrl = Field(
        default=SecretStr(""), description="store of the cards' files (s3://, gs://, abfs://, file://); empty: the home"
    )
    cache_dir: AbsolutePath = Field(
        default_factory=lambda: platformdirs.user_cache_path("arrowmoe"), description="converted base models"
    )
    name: NodeName = Field(default_factory=lambda: socket.gethostname()[:63] or "node", description="shown to peers")
    host: str = Field(default="127.0.0.1", min_length=1, description="address that the Flight server listens on")
    flight_port: int = Field(default=0, ge=0, le=65_535, description="its port; 0: any free one")
    open: bool = Field(default=False, description="answer every node that is not blocked, beyond loopback too")
    discovery: bool = Field(default=True, description="announce this node and look for others with mDNS")
    interfaces: Names = Field(
        default=(), description="network interfaces to look for nodes on; empty: all but those of containers and VPNs"
    )
    peers: Peers = Field(default=(), description="peers that are always asked, as HOST:PORT")
    route_to_offers: bool = Field(
        default=True, description="whether cards that peers offer are routed to, and then fetched"
    )
    peer_interval_s: float = Field(
        default=5.0, ge=0.1, le=86_400, description="how often peers are asked what they offer"
    )
    sync_on_start: bool = Field(default=False, description="copy what peers offer as soon as the node runs")
    scrub_mib_per_s: float = Field(
        default=4.0, ge=0, description="pace at which all cards are read again to find damage; 0: never"
    )
    bases: Names = Field(default=(), description="base models to load: hub id, directory, GGUF file or builtin:NAME")
    embedder: str = Field(default="builtin:minilm", min_length=1, description="encoder whose space the router works in")
    device: str = Field(default="auto", min_length=1, description="torch device; auto: CUDA where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="element type of base models"
    )
    engine: EngineSettings = EngineSettings()
    router: RouterSettings = RouterSettings()
    teacher: TeacherSettings = TeacherSettings()
    evolution: EvolutionSettings = EvolutionSettings()
    sync: SyncSettings = SyncSettings()
    trust: TrustSettings = TrustSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the constructor is given: a library reads no environment behind its caller's back."""
        return (init_settings,)

    @property
    def stores(self) -> dict[str, str]:
        """Where the catalog and the cards lie, with their secrets, as `Registry.open` takes it."""
        return {"catalog_url": self.catalog_url.get_secret_value(), "blobs_url": self.blobs_url.get_secret_value()}

    @staticmethod
    def meaning(name: str) -> str:
        """What the setting with a dotted name is for."""
        groups: dict[str, type[BaseModel]] = {
            "engine": EngineSettings,
            "router": RouterSettings,
            "teacher": TeacherSettings,
            "evolution": EvolutionSettings,
            "sync": SyncSettings,
            "trust": TrustSettings,
            "log": LogSettings,
        }
        model = groups.get(name.partition(".")[0], Settings)
        return model.model_fields[name.rpartition(".")[2]].description or ""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Settings, the source of each value by dotted name, and the file that was read."""

    settings: Settings
    sources: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None

    def rows(self) -> list[tuple[str, Any, str]]:
        """Dotted name, JSON value and source of every setting."""
        values = _leaves(self.settings.model_dump(mode="json"))
        return [(name, value, self.sources.get(name, DEFAULT)) for name, value in values.items()]


def load(flags: Mapping[str, Any] | None = None, config: Path | str | None = None) -> Loaded:
    """Merge all layers; flags that are None are not given. Raises `ConfigurationError` with every error at once."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    environment = _environment()
    file = _config_file(config, given.get("home", environment.get("home")))
    layers = [(f"file {file}", _read(file) if file else {}), ("environment", environment), ("flag", given)]
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers:
        _merge(merged, values)
        sources |= dict.fromkeys(_leaves(values), source)
    try:
        return Loaded(settings=Settings(**merged), sources=sources, file=file)
    except ValidationError as error:
        raise _all_errors(error, sources) from error


def _environment() -> dict[str, Any]:
    try:
        values: dict[str, Any] = EnvSettingsSource(Settings, env_ignore_empty=True)()
    except SettingsError as error:
        raise ConfigurationError(
            f"a variable of the environment cannot be read: {error}",
            hint=f"write nested settings as {PREFIX}ROUTER__THRESHOLD=0.4",
        ) from error
    return values


def _config_file(config: Path | str | None, home: Any) -> Path | None:
    """The file to read: the flag's, the variable's, or the one in the home directory."""
    chosen = config or os.environ.get(CONFIG_VARIABLE)
    if chosen:
        path = Path(chosen).expanduser().absolute()
        if not path.is_file():
            raise ConfigurationError(f"no configuration file {path}", hint=f"check --config and {CONFIG_VARIABLE}")
        return path
    root = Path(home).expanduser() if home else Settings().home
    found = [root / name for name in CONFIG_NAMES if (root / name).is_file()]
    if len(found) > 1:
        raise ConfigurationError(f"expected one configuration file in {root}, found {', '.join(p.name for p in found)}")
    return found[0].absolute() if found else None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else tomllib.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"expected settings by name in {path}, got {type(values).__name__}")
    if odd := [name for name in values if not isinstance(name, str)]:  # YAML reads `on` and `1` as no text
        raise ConfigurationError(f"expected settings by name in {path}, got {odd[0]!r} for a name")
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = dict(value) if isinstance(value, Mapping) else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        leaves |= _leaves(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return leaves


def _all_errors(error: ValidationError, sources: Mapping[str, str]) -> ConfigurationError:
    lines = [_one_error(dict(item), sources) for item in error.errors(include_url=False)]
    count = "one setting is" if len(lines) == 1 else f"{len(lines)} settings are"
    return ConfigurationError(
        f"{count} wrong:" + "".join(f"\n  {line}" for line in lines),
        hint="`arrowmoe config show` lists every setting with its meaning, once these are mended or taken away",
    )


def _one_error(item: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    parts = [str(part) for part in item["loc"]]
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    known = next((name for name in prefixes if name in sources), prefixes[0])
    source = sources.get(known, DEFAULT)
    if item["type"] == "extra_forbidden":
        return f"{_spelled(known, source)}: no such setting"
    if item["type"] == "value_error":  # our own, which says what it got
        return f"{_spelled(known, source)}: {item['ctx']['error']}"
    return f"{_spelled(known, source)}: {item['msg']}, got {item['input']!r}"


def _spelled(name: str, source: str) -> str:
    """A setting's name as its source writes it."""
    if source == "environment":
        return PREFIX + name.replace(".", "__").upper()
    if source == "flag":
        return "--" + _FLAGS.get(name, name).replace("_", "-")
    return f"{name} ({source})"


__all__ = [
    "ConfigurationError",
    "EngineSettings",
    "EvolutionSettings",
    "Loaded",
    "LogSettings",
    "RouterSettings",
    "Settings",
    "SyncSettings",
    "TeacherSettings",
    "TrustSettings",
    "load",
]
