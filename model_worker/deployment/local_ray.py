"""A Ray on this machine alone that outlives the command that started it, and is found and stopped by others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from memory_service.errors import FailedPrecondition, Unavailable

_START_S = 120.0
_STOP_S = 60.0
_AUTH = "RAY_AUTH_MODE"
# Ray Serve ends a proxy that is not ready in three times so many seconds, and starts another. Its 5 are too few where
# models are loaded on the same cores: no proxy would ever be ready.
_PROXY = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A running one."""

    address: str
    pid: int  # Of the process that watches over Ray's others; they end with it.
    started: float  # Of that process, seconds since the epoch: numbers of processes come again.
    directory: str  # Ray's sockets and logs.

    @classmethod
    def running(cls) -> Self | None:
        """The one that was started here, if it still runs."""
        try:
            found = cls(**json.loads(_state_file().read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found._process() is not None else None

    @classmethod
    def start(cls) -> Self:
        """Start one, whose drivers need the token in ~/.ray. Raises FailedPrecondition if it fails."""
        file = _state_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        # Short: Unix sockets in it have paths of at most 107 characters.
        directory = Path(tempfile.mkdtemp(prefix="fot-ray-"))
        environment = _PROXY | os.environ | {_AUTH: os.environ.get(_AUTH, "token")}
        if environment[_AUTH] == "token" and "RAY_AUTH_TOKEN" not in os.environ:
            _ray(["get-auth-token", "--generate"], environment)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"]
        given = ["--disable-usage-stats", "--include-dashboard=false"]
        log = directory / "start.log"
        with open(log, "w", encoding="utf-8") as out:
            process = subprocess.Popen(
                [*command, *given, f"--temp-dir={directory}"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the command that started it.
            )
        address = _address(process, directory, log)
        found = cls(address, process.pid, psutil.Process(process.pid).create_time(), str(directory))
        file.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return found

    def stop(self) -> None:
        """End it and all that runs on it."""
        process = self._process()
        if process is not None:
            children = process.children(recursive=True)
            process.terminate()
            _, left = psutil.wait_procs([process, *children], _STOP_S)
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        _state_file().unlink(missing_ok=True)

    def show_token(self) -> None:
        """Let this process show the token in ~/.ray: Ray does so by itself only where it is told no address."""
        os.environ.setdefault(_AUTH, "token")
        from ray._raylet import Config  # type: ignore[attr-defined]  # its stub lacks it

        Config.initialize("")  # It read the environment when it was imported.

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


def _address(process: subprocess.Popen[bytes], directory: Path, log: Path) -> str:
    """Where Ray listens, once it does."""
    until = time.monotonic() + _START_S
    file = directory / "ray_current_cluster"
    while time.monotonic() < until:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise FailedPrecondition(f"Ray did not start: {last} (all of it: {log})")
        with suppress(OSError):
            if address := file.read_text(encoding="utf-8").strip():
                return address
        time.sleep(0.1)
    process.terminate()
    raise Unavailable(f"Ray did not start within {_START_S:.0f} s; its log is {log}")


def _ray(arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedPrecondition(f"`ray {' '.join(arguments)}` failed: {done.stderr.strip().rpartition(chr(10))[2]}")


def _state_file() -> Path:
    root = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(root).expanduser() / "fot" / "ray.json"
