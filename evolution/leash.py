"""Runs a command that ends when its parent does, however the parent ends (Linux).

    python -m evolution.leash PARENT_PID COMMAND [ARGUMENT …]

Asked of the kernel by the child itself, for Python code between fork and exec can hang a parent with threads. The
kernel watches the parent's thread that started the command: it has to wait for the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def leashed(command: Sequence[str]) -> list[str]:
    """`command` as a child of this process that does not outlive it."""
    return [sys.executable, "-m", "evolution.leash", str(os.getpid()), *command]


def main() -> None:
    """Become the command; no return."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
