"""Runs inside bubblewrap as a script: one process per program, each in namespaces of its own. Imports nothing of Assay.

The driver clones a process per program into new user, pid, ipc and mount namespaces. There the process, still trusted,
mounts a private /tmp, reads *its* program from the batch, hides /proc, keeps only /dev/null and its output file, sets
limits, gives up all capabilities, installs a filter of system calls, and only then runs the program. As the first
process of its pid namespace it sees no other, so it can neither signal nor trace one; when it ends, all in there ends.
The driver alone writes results, to a pipe that no program holds. As a clone inherits memory, the driver never holds
a program or what one printed: the output goes from file to pipe within the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import resource
import runpy
import select
import signal
import site
import struct
import sys
import time
from typing import Any, NamedTuple, NoReturn

STATUSES = ("ok", "error", "memory", "cpu", "wall", "output", "killed")
FRAME = struct.Struct("<IBI")  # index in the batch, index in STATUSES, bytes of output that follow
HEADER = struct.Struct("<Q")  # bytes of the JSON header that follows; behind it the programs, end to end
INSTALLED = "/installed"
OK, ERROR, MEMORY, UNREADY = 0, 1, 77, 78  # exit codes of a program's process
USER = 65534
DESCRIPTORS = 64
INODES = 256
# loaded once, in the driver: modules that programs often import, and two that `runpy` needs
WARM = """collections datetime decimal fractions functools itertools json math operator random re statistics string time
pkgutil zipimport"""

NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000  # CLONE_NEWNS, NEWIPC, NEWUSER, NEWPID
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 4, 22, 38, 2
CAPABILITY_VERSION_3 = 0x20080522


class Calls(NamedTuple):
    """A machine's system calls: its audit architecture, the number of `clone`, and the numbers that are refused."""

    arch: int
    clone: int
    denied: tuple[int, ...]


# What no program needs and an attacker does: new processes and threads, other programs, signals, tracing, sockets, shared
# memory outside the limits, mounts and namespaces, keyrings, kernel interfaces with a history of holes.
# fmt: off
CALLS = {
    "x86_64": Calls(arch=0xC000003E, clone=56, denied=(  # linux/audit.h, asm/unistd_64.h
        41, 53, 29, 64, 68, 240,                                # socket socketpair shmget semget msgget mq_open
        56, 435, 57, 58, 59, 322,                               # clone clone3 fork vfork execve execveat
        101, 62, 200, 234, 129, 297, 424, 434, 438,             # ptrace *kill *sigqueueinfo pidfd_*
        310, 311, 440, 312,                                     # process_vm_* process_madvise kcmp
        272, 308, 165, 166, 155, 161,                           # unshare setns mount umount2 pivot_root chroot
        428, 429, 430, 431, 432, 433, 442,                      # open_tree move_mount fs* mount_setattr
        248, 249, 250, 321, 298, 323, 425, 426, 427,            # keys bpf perf_event_open userfaultfd io_uring_*
        319, 447, 162, 306, 73,                                 # memfd_* sync syncfs flock
    )),
    "aarch64": Calls(arch=0xC00000B7, clone=220, denied=(  # asm-generic/unistd.h; no fork and vfork there
        198, 199, 194, 190, 186, 180,
        220, 435, 221, 281,
        117, 129, 130, 131, 138, 240, 424, 434, 438,
        270, 271, 440, 272,
        97, 268, 40, 39, 41, 51,
        428, 429, 430, 431, 432, 433, 442,
        217, 218, 219, 280, 241, 282, 425, 426, 427,
        279, 447, 81, 267, 32,
    )),
}
# fmt: on

libc = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock, as the calls around a clone must


def check(result: int) -> None:
    """Raise OSError when a call of the C library failed."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def clone(flags: int) -> int:
    """Fork into new namespaces: `os.fork` with flags, between the hooks that Python documents for this purpose."""
    arguments = (CALLS[platform.machine()].clone, flags | signal.SIGCHLD, 0, 0, 0, 0)
    words = [ctypes.c_long(argument) for argument in arguments]
    libc.PyOS_BeforeFork()
    pid = int(libc.syscall(*words))
    problem = ctypes.get_errno()
    if pid == 0:
        libc.PyOS_AfterFork_Child()
    else:
        libc.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(problem, os.strerror(problem))
    return pid


def furnish(disk_bytes: int) -> None:
    """First steps in new namespaces: our user is known there, /tmp is private and bounded, /proc empty."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{USER} {USER} 1"), ("gid_map", f"{USER} {USER} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where the whole machine runs short, programs go first
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    options = f"size={disk_bytes},nr_inodes={INODES},mode=700".encode()
    check(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, options))
    check(libc.mount(b"tmpfs", b"/proc", b"tmpfs", flags | MS_RDONLY, b"size=4k"))


def give_up_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets; nothing executed later can regain one."""
    header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, bytes(24)))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def filter_calls() -> None:
    """Let the kernel refuse (EPERM) this process the calls in `CALLS`, for good. Classic BPF over struct seccomp_data."""
    calls = CALLS[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    rules = [(load, 0, 0, 4), (equal, 1, 0, calls.arch), (end, 0, 0, 0x80000000), (load, 0, 0, 0)]  # other arch: kill
    tests = [(at_least, 0x40000000), *((equal, number) for number in calls.denied)]  # 0x40000000: x32's second table
    rules += [(code, len(tests) - at, 0, value) for at, (code, value) in enumerate(tests)]
    rules += [(end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00050001)]  # allow; fail with EPERM
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def set_limits(header: dict[str, Any]) -> None:
    """Resource limits, soft = hard, so that passing the CPU limit kills at once."""
    for what, value in (
        (resource.RLIMIT_CPU, header["cpu_seconds"]),
        (resource.RLIMIT_AS, header["memory_bytes"]),
        (resource.RLIMIT_FSIZE, header["output_bytes"] + 1),  # one more tells too much from just enough
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 1),  # too small for a file, and unlike 0 it also keeps the kernel from a core handler
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 16),
    ):
        _, most = resource.getrlimit(what)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))


def run_program(start: int, size: int, output: int, header: dict[str, Any]) -> NoReturn:
    """Become the program at `start` of the batch. Once it runs nothing in this process is trusted. Never returns."""
    code = UNREADY
    try:
        if header["nested"]:
            furnish(header["disk_bytes"])
        os.chdir("/tmp")
        with open("program.py", "wb") as file:
            file.write(os.pread(0, size, start))
        null = os.open("/dev/null", os.O_RDWR)
        for source, target in ((null, 0), (output, 1), (null, 2)):
            os.dup2(source, target)
        os.closerange(3, DESCRIPTORS)
        set_limits(header)
        give_up_capabilities()
        filter_calls()
        code = ERROR
        runpy.run_path("program.py", run_name="__main__")
        code = OK
    except SystemExit as request:
        code = ERROR if request.code else OK
    except MemoryError:
        code = MEMORY
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)


class Running:
    """A program's process: what the driver knows of it."""

    def __init__(self, index: int, start: int, size: int, header: dict[str, Any]) -> None:
        self.index, self.header = index, header
        self.output = os.memfd_create("output")
        self.deadline = time.monotonic() + header["wall_seconds"]
        self.pid = clone(NAMESPACES) if header["nested"] else os.fork()
        if self.pid == 0:
            run_program(start, size, self.output, header)
        self.ended = os.pidfd_open(self.pid)

    def finish(self, late: bool, results: int) -> None:
        """End the process and write its frame; none if it never came to run its program."""
        os.kill(self.pid, signal.SIGKILL)
        _, code, usage = os.wait4(self.pid, 0)
        size = os.fstat(self.output).st_size
        if size > self.header["output_bytes"]:
            status = "output"
        elif late:
            status = "wall"
        elif os.WIFSIGNALED(code):
            full = usage.ru_utime + usage.ru_stime >= self.header["cpu_seconds"] - 0.1
            status = "cpu" if full else "killed"
        else:
            status = {OK: "ok", MEMORY: "memory", UNREADY: ""}.get(os.WEXITSTATUS(code), "error")
        if status:
            size = min(size, self.header["output_bytes"])
            os.write(results, FRAME.pack(self.index, STATUSES.index(status), size))
            at = 0
            while at < size:
                at += os.sendfile(results, self.output, at, size - at)
        os.close(self.output)
        os.close(self.ended)


def main() -> None:
    """Read the header of the batch on standard input, run its programs, write one frame each to standard output."""
    (length,) = HEADER.unpack(os.pread(0, HEADER.size, 0))
    header = json.loads(os.pread(0, length, HEADER.size))
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    results = os.dup(1)
    os.dup2(2, 1)
    for name in WARM.split():
        importlib.import_module(name)
    site.setquit()  # `exit()` and `quit()`: python -S leaves them out
    sys.path.append(INSTALLED)
    gc.freeze()
    start = HEADER.size + length
    waiting = list(enumerate(header.pop("sizes")))[::-1]
    running: dict[int, Running] = {}
    poll = select.poll()
    while waiting or running:
        while waiting and len(running) < header["jobs"]:
            index, size = waiting.pop()
            program = Running(index, start, size, header)
            running[program.ended] = program
            poll.register(program.ended, select.POLLIN)
            start += size
        left = min(program.deadline for program in running.values()) - time.monotonic()
        ended = {fd for fd, _ in poll.poll(max(0, math.ceil(left * 1000)))}
        for fd, program in list(running.items()):
            late = fd not in ended and time.monotonic() >= program.deadline
            if late or fd in ended:
                poll.unregister(fd)
                del running[fd]
                program.finish(late, results)


if __name__ == "__main__":
    main()
