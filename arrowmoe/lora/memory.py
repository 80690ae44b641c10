"""What torch says of memory: how much a device has, and that there is none left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arrowmoe.errors import AdapterMemoryError


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of a CUDA device; None for any other, which has none of its own."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


@contextmanager
def naming_memory(wanted: str) -> Iterator[None]:
    """Raise `AdapterMemoryError` where the device or the host has no memory left."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise AdapterMemoryError(
            f"{wanted}: out of memory: {str(error).partition(chr(10))[0]}",
            hint="use smaller batches, or set engine.budget_mib to less",
            later=True,
        ) from error


__all__ = ["device_memory", "naming_memory"]
