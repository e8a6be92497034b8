"""Runs peers' programs where they can do no harm: bubblewrap, namespaces, limits and a filter of system calls.

What a program finds: Python's standard library, read-only; a private /tmp of a few MB that is gone afterwards; no other
file, no network, no environment, no /proc, no other process, and no way to make one. It is one process with one thread.
A batch shares one bubblewrap and one interpreter start; `sandbox_driver` then isolates the programs from each other.
Where a machine forbids namespaces within namespaces, or /proc within them, every program gets a bubblewrap of its own:
as safe, many times slower. Hash seeds are fixed, so that all nodes see the same order of sets.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import IO, Literal, cast

from assay.config import ConfigError
from assay.swarm import sandbox_driver as driver

Status = Literal["ok", "error", "memory", "cpu", "wall", "output", "killed", "too_long"]
START_SECONDS = 20.0  # what bubblewrap and an interpreter may take to start on a crowded machine
SLACK_SECONDS = 1.0  # per program, for its supervisor
MOST_JOBS = 8
HINT = "the code task runs peers' programs only under bubblewrap"
PROBE = (b"import math\nprint(math.isqrt(1764))", b"print(6 * 7)")


class SandboxMissing(ConfigError):
    """Bubblewrap is absent or cannot work here; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use, beside its one process with one thread; all greater than 0.

    CPU seconds are whole. Memory is address space, the interpreter's own 30 MB or so included. Disk is all of /tmp;
    one file there may hold as many bytes as the output.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 5.0
    memory_mb: int = 256
    disk_mb: int = 4
    output_bytes: int = 65536
    program_bytes: int = 20_000
    """Longer programs (UTF-8) are refused without being run."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ConfigError(f"sandbox: {field.name} must be greater than 0 (got {getattr(self, field.name)})")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended and its last non-empty printed line, stripped ("" if none).

    `ok`: ran to its end. `error`: an exception or a non-zero exit. `memory`: ended by MemoryError. `cpu`, `wall`,
    `output`: passed that limit. `killed`: a signal, or no result even when run alone. `too_long`: never run.
    """

    status: Status
    last_line: str


class Sandbox:
    """Runs batches of programs; holds no process between them.

    `installed` maps module names to Python source; every program can import them, after the standard library (they
    stand for packages that anybody could publish). `nested` says whether a batch shares one bubblewrap. Raises
    `SandboxMissing` at once where programs cannot be run safely.
    """

    def __init__(self, limits: Limits | None = None, installed: Mapping[str, str] | None = None) -> None:
        self.limits = limits or Limits()
        self.installed = dict(installed or {})
        for name in self.installed:
            if not name.isidentifier():
                raise ConfigError(f"sandbox: installed module {name!r} must be a plain module name")
        self._bwrap = _find_bwrap()
        self.jobs = min(len(os.sched_getaffinity(0)), MOST_JOBS)  # a core each: CPU and wall limits agree
        self.nested = True
        if self._probe() is not None:
            self.nested = False
            if problem := self._probe():
                raise SandboxMissing(f"{HINT}, which fails here ({problem}): allow unprivileged user namespaces")

    def run(self, programs: Sequence[str]) -> list[Outcome]:
        """Run each program by itself; outcomes in the order of `programs`, each independent of the others.

        Equal programs are run once: members of a group often are, and a program that draws lots or reads the clock then
        has one outcome, not one a copy.
        """
        distinct = {program: at for at, program in enumerate(dict.fromkeys(programs))}
        outcomes = self._run(list(distinct))
        return [outcomes[distinct[program]] for program in programs]

    def _run(self, programs: Sequence[str]) -> list[Outcome]:
        sources = [program.encode("utf-8", errors="replace") for program in programs]
        outcomes = {at: Outcome("too_long", "") for at, s in enumerate(sources) if len(s) > self.limits.program_bytes}
        short = [at for at in range(len(sources)) if at not in outcomes]
        if self.nested and len(short) > 1:
            results = self._batch([sources[at] for at in short])
            outcomes |= {short[index]: outcome for index, outcome in results.items()}
        # alone: whatever the shared bubblewrap did not answer, be it killed from outside or by a program
        rest = [at for at in short if at not in outcomes]
        with ThreadPoolExecutor(self.jobs) as pool:
            for at, alone in zip(rest, pool.map(lambda at: self._batch([sources[at]]), rest)):
                outcomes[at] = alone.get(0, Outcome("killed", ""))
        return [outcomes[at] for at in range(len(sources))]

    def _probe(self) -> str | None:
        """Two programs of our own, together if `nested`: None if they run as they must, else what went wrong."""
        batches = (PROBE,) if self.nested else tuple((program,) for program in PROBE)
        with tempfile.TemporaryFile() as errors:
            for batch in batches:
                results = self._batch(batch, errors)
                for outcome in results.values():
                    if outcome != Outcome("ok", "42"):
                        raise ConfigError(f"sandbox: a program that prints 42 ends as {outcome}: raise the limits")
                if len(results) < len(batch):
                    errors.seek(0)
                    return _last_line(errors.read(4000)) or "no answer"
        return None

    def _batch(self, sources: Sequence[bytes], errors: IO[bytes] | None = None) -> dict[int, Outcome]:
        """Run programs in one bubblewrap; outcomes by index, without those that gave none in time."""
        limits, jobs = self.limits, min(self.jobs, len(sources))
        header = json.dumps(
            {
                "nested": self.nested,
                "jobs": jobs,
                "sizes": [len(source) for source in sources],
                "cpu_seconds": limits.cpu_seconds,
                "wall_seconds": limits.wall_seconds,
                "memory_bytes": limits.memory_mb << 20,
                "disk_bytes": limits.disk_mb << 20,
                "output_bytes": limits.output_bytes,
            }
        ).encode()
        files = [_memory_file(driver.HEADER.pack(len(header)) + header + b"".join(sources))]
        files += [_memory_file(source.encode("utf-8", errors="replace")) for source in self.installed.values()]
        rounds = -(-len(sources) // jobs)
        try:
            process = subprocess.Popen(
                [*self._command(), *self._modules(files[1:]), "--remount-ro", "/", "--", *_python()],
                stdin=files[0],
                stdout=subprocess.PIPE,
                stderr=errors or subprocess.DEVNULL,
                pass_fds=files[1:],
                env={},
                bufsize=0,
            )
        except OSError as error:
            raise SandboxMissing(f"{HINT}, which does not start: {error}") from None
        finally:
            for file in files:
                os.close(file)
        try:
            seconds = START_SECONDS + rounds * (limits.wall_seconds + SLACK_SECONDS)
            return dict(_outcomes(process, time.monotonic() + seconds, len(sources), limits.output_bytes))
        finally:
            process.kill()  # and with it everything inside: --die-with-parent
            process.wait()

    def _command(self) -> list[str]:
        """Bubblewrap and the file system of the batch, up to the point where the root is made read-only."""
        user = str(driver.USER)
        command = [self._bwrap, "--unshare-all", "--unshare-user", "--uid", user, "--gid", user]
        command += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
        for path in _needed():
            command += ["--ro-bind", path, path]
            for hidden in (f"{path}/site-packages", f"{path}/dist-packages"):
                if os.path.isdir(hidden):
                    command += ["--tmpfs", hidden, "--remount-ro", hidden]
        command += ["--ro-bind", str(Path(driver.__file__).resolve()), "/driver.py"]
        command += ["--dev-bind", "/dev/null", "/dev/null", "--dev-bind", "/dev/urandom", "/dev/urandom"]
        command += ["--dir", driver.INSTALLED]
        if self.nested:  # every program mounts its own /tmp, and hides /proc, which only its supervisor needs
            command += ["--proc", "/proc", "--dir", "/tmp"]
        else:
            command += ["--size", str(self.limits.disk_mb << 20), "--tmpfs", "/tmp"]
        return [*command, "--chdir", "/", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]

    def _modules(self, files: Sequence[int]) -> list[str]:
        words = []
        for name, file in zip(self.installed, files):
            words += ["--file", str(file), f"{driver.INSTALLED}/{name}.py"]
        return words


def _find_bwrap() -> str:
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxMissing(f"{HINT}, which is not installed: apt-get install bubblewrap (Linux only)")
    if platform.machine() not in driver.CALLS:
        raise SandboxMissing(f"{HINT} on {' or '.join(driver.CALLS)}, not on {platform.machine()}: use another machine")
    return found


def _interpreter() -> Path:
    """The real file behind `sys.executable`, outside any virtual environment."""
    return Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()


def _python() -> list[str]:
    """Isolated as by -I -S, but for the fixed hash seed, which -I would ignore."""
    return [str(_interpreter()), "-P", "-s", "-S", "-B", "-X", "utf8", "/driver.py"]


@cache
def _needed() -> tuple[str, ...]:
    """What Python needs and no more: interpreter, standard library, and the shared libraries these are linked to."""
    interpreter = str(_interpreter())
    extensions = {Path(path).resolve() for path in sys.path if Path(path).name == "lib-dynload"}
    found = [path for at in sorted(extensions) for path in sorted(at.glob("*.so"))]
    modules = [str(path) for path in found if not path.name.startswith(("_tkinter", "_test", "_xx", "xx"))]
    try:
        said = subprocess.run(["ldd", interpreter, *modules], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxMissing(f"{HINT} and needs the command ldd (apt-get install libc-bin): {error}") from None
    libraries = sorted(set(re.findall(r"(/\S+) \(0x", said)))
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    folders = [standard, *(at for at in sorted(extensions) if standard not in at.parents)]
    cached = [path for path in ("/etc/ld.so.cache",) if os.path.exists(path)]
    return (*(str(folder) for folder in folders), interpreter, *libraries, *cached)


def _memory_file(content: bytes) -> int:
    """Descriptor of an unnamed file that holds `content`, at its start."""
    file = os.memfd_create("batch")
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _outcomes(
    process: subprocess.Popen[bytes], deadline: float, count: int, most: int
) -> Iterator[tuple[int, Outcome]]:
    """Index and outcome of each frame that comes until the deadline; holds no more than one frame of `most` bytes."""
    with cast(IO[bytes], process.stdout) as pipe:
        for _ in range(count):
            head = _read(pipe, driver.FRAME.size, deadline)
            if head is None:
                return
            index, status, size = driver.FRAME.unpack(head)
            output = _read(pipe, size, deadline) if size <= most else None
            if output is None or index >= count:
                return
            yield index, Outcome(cast(Status, driver.STATUSES[status]), _last_line(output))


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytes | None:
    """Exactly `size` bytes; None if they do not come before the deadline."""
    raw = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(raw) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(math.ceil(left * 1000)):
            return None
        chunk = os.read(pipe.fileno(), size - len(raw))
        if not chunk:
            return None
        raw += chunk
    return raw


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", errors="replace").split("\n")
    return next((text for line in reversed(lines) if (text := line.strip())), "")
