"""Whether a process that we started still lives: it tells so by systemd's protocol, and is ended if it falls silent."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

_LOOK_S = 0.5


class Heartbeat:
    """Where one process tells that it lives. Whoever waits for its end must call `watch` meanwhile."""

    def __init__(self, silent_s: float):
        self._silent_s = silent_s
        self._directory = Path(tempfile.mkdtemp(prefix="fot-beat-"))  # Short, and nobody else's.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_LOOK_S)
        self._socket.bind(str(self._directory / "s"))

    @property
    def environment(self) -> dict[str, str]:
        """What the process must find in its environment."""
        return {"NOTIFY_SOCKET": str(self._directory / "s"), "WATCHDOG_USEC": str(int(self._silent_s * 1e6))}

    def watch(self, process: subprocess.Popen[str]) -> bool:
        """Wait until the process ends; kill it if it told that it lives, and then nothing for too long. Whether it was.

        One that never told anything is still starting, however long that takes.
        """
        heard: float | None = None
        while process.poll() is None:
            try:
                self._socket.recv(4096)
            except TimeoutError:
                if heard is not None and time.monotonic() - heard > self._silent_s:
                    process.kill()
                    process.wait()
                    return True
            else:
                heard = time.monotonic()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)
