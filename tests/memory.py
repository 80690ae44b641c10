"""How much memory this process takes, read where a child does not begin at its parent's size (`ru_maxrss` does)."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the program began, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Count the peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
