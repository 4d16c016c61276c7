"""`fot serve` as a process: started, started again when it ends, stopped. Kubernetes does that with the same one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from model_worker.deployment.heartbeat import Heartbeat
from model_worker.deployment.leash import leashed

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_LASTED_S = 60.0  # A process that ran for so long began well.
_SERVES = re.compile(r"^fot serves .* at grpcs?://(\S+?:(\d+))(,|$)")


class ServiceProcess:
    """One service over one directory, at a port that it keeps as long as it is free. Thread-safe."""

    def __init__(
        self, directory: Path, host: str, arguments: Sequence[str], environment: Mapping[str, str], hung_after_s: float
    ):
        """Starts at once. `arguments` are further ones of `fot serve`; one that is silent for so long is killed."""
        self.directory = directory
        self._host = host
        self._arguments = tuple(arguments)
        self._environment = dict(environment)
        self._hung_after_s = hung_after_s
        self._port_file = directory.with_name(directory.name + ".port")
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self.address = ""  # Empty: it does not serve now.
        self.starts = 0
        self.problem = ""
        # The thread that starts the process waits for it: the process ends with that thread.
        self._thread = threading.Thread(target=self._keep, name=f"fot-{directory.name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process; 0 if there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Harmless twice."""
        self._stopping.set()
        until = time.monotonic() + grace_s
        while self._thread.is_alive():
            process = self._process
            if process is not None and process.poll() is None:
                process.terminate() if time.monotonic() < until else process.kill()
            self._thread.join(0.2)

    def _keep(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self._run()
            except OSError as error:
                self.problem = f"it cannot be started: {error}"
            failures = 0 if time.monotonic() - began > _LASTED_S else failures + 1
            # The first time at once: it was killed, or the machine's owner restarted it.
            self._stopping.wait(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 2)) if failures > 1 else 0.0)

    def _run(self) -> None:
        """One life of the process."""
        self.directory.mkdir(parents=True, exist_ok=True)
        listen = f"{self._host}:{self._known_port()}"
        command = [sys.executable, "-m", "memory_service.cli", "serve", str(self.directory), "--listen", listen]
        told: list[str] = []
        with Heartbeat(self._hung_after_s) as heartbeat:
            self._process = process = subprocess.Popen(
                leashed([*command, *self._arguments]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=self._environment | heartbeat.environment,
            )
            self.starts += 1
            readers = (
                threading.Thread(target=_relay, args=(process, told), daemon=True),
                threading.Thread(target=self._meet, args=(process,), daemon=True),
            )
            for one in readers:
                one.start()
            hung = heartbeat.watch(process)
        for one in readers:
            one.join()
        self.address = ""
        last = next((line for line in reversed(told) if line.startswith("fot: ")), "").removeprefix("fot: ")
        self.problem = last or f"its process ended (exit code {process.returncode})"
        if hung:
            self.problem = f"its process hung: it was silent for {self._hung_after_s:g} s, and was killed"
            sys.stderr.write(f"{self.problem}\n")
        if "cannot listen" in last:
            self._port_file.unlink(missing_ok=True)

    def _meet(self, process: subprocess.Popen[str]) -> None:
        """It says where it listens."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                if found := _SERVES.match(line.strip()):
                    self._port_file.write_text(found[2])
                    self.address, self.problem = found[1], ""

    def _known_port(self) -> int:
        with suppress(OSError, ValueError):
            return int(self._port_file.read_text())
        return 0


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """A service's environment: this process's without what Ray set for its workers, and the settings."""
    # Ray gives actors without CPUs one thread, and those without GPUs none to see.
    not_its = {"OMP_NUM_THREADS", "WATCHDOG_PID"}
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        not_its.add("CUDA_VISIBLE_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in not_its} | dict(settings)


def _relay(process: subprocess.Popen[str], told: list[str]) -> None:
    """Its log is ours, where Ray shows it; the last lines say why it ended."""
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            sys.stderr.write(line)
            told.append(line.strip())
            del told[:-20]
