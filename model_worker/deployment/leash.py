"""Run a command that ends with the thread that started it, however that ends: `leash PARENT COMMAND…`.

Without it, a keeper that is killed would leave a service that holds the directory its successor needs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str]) -> list[str]:
    """The command line that runs a command on a leash of this process."""
    return [sys.executable, "-m", "model_worker.deployment.leash", str(os.getpid()), *command]


def main(arguments: Sequence[str]) -> None:
    """Ask the kernel for SIGTERM at the parent's end, then become the command."""
    parent, *command = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return  # It ended before we asked.
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
