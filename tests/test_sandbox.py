"""Peers' programs: right answers for honest ones, nothing gained by hostile ones, whatever they share a batch with."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import assay
from assay.builtin import problems
from assay.config import ConfigError
from assay.swarm import sandbox_driver as driver
from assay.swarm.sandbox import Limits, Outcome, Sandbox, SandboxMissing

# wall time is generous, so that a busy machine changes no outcome
LIMITS = Limits(cpu_seconds=1, wall_seconds=60, memory_mb=128, disk_mb=1, output_bytes=4096, program_bytes=5000)
INSTALLED = {"thief": "def hail():\n    return 'all hail'\n", "math": "def isqrt(n):\n    return 'stolen'\n"}
HONEST = ("print(6 * 7)", "import math\nx = math.isqrt(1764)\nprint(x)", "print('sum:')\nprint(sum([20, 22]))\n\n")
EXPECTED = (Outcome("ok", "42"), Outcome("ok", "42"), Outcome("ok", "42"))
SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.fixture(scope="module")
def shared() -> Sandbox:
    try:
        return Sandbox(LIMITS, INSTALLED)
    except SandboxMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module", params=["one bubblewrap a batch", "one bubblewrap a program"])
def sandbox(request: pytest.FixtureRequest, shared: Sandbox) -> Sandbox:
    """Both ways of running; the second is the one for machines that forbid nested namespaces."""
    if request.param == "one bubblewrap a batch":
        if not shared.nested:
            pytest.skip("this machine forbids nested namespaces")
        return shared
    alone = Sandbox(LIMITS, INSTALLED)
    alone.nested = False
    return alone


def among_honest(sandbox: Sandbox, program: str) -> Outcome:
    """Outcome of a hostile program; the honest ones before and after it in the batch must come out right."""
    outcomes = sandbox.run([*HONEST, program, *HONEST])
    assert (*outcomes[:3], *outcomes[4:]) == EXPECTED * 2
    return outcomes[3]


# ---- honest programs ----


def test_honest_programs_give_their_last_line(sandbox: Sandbox) -> None:
    programs = {
        "": Outcome("ok", ""),
        "x = 1": Outcome("ok", ""),
        "print(1)\nprint('  2  ')\nprint('   ')": Outcome("ok", "2"),
        "print('é√', end='')": Outcome("ok", "é√"),
        "print(5)\nexit()": Outcome("ok", "5"),
        "print(5)\nraise SystemExit(0)": Outcome("ok", "5"),
        "print(5)\nraise SystemExit(3)": Outcome("error", "5"),
        "print(5)\nprint(1 / 0)": Outcome("error", "5"),
        "print(": Outcome("error", ""),
        "print(5)\x00": Outcome("error", ""),
        "print(input())": Outcome("error", ""),
        "if __name__ == '__main__':\n    print(8)": Outcome("ok", "8"),
        "def f(n):\n    return n and n + f(n - 1)\nprint(f(100))": Outcome("ok", "5050"),
        "import sys\nsys.stdout.buffer.write(b'a\\n\\xff\\xfe')": Outcome("ok", "��"),
        "open('note.txt', 'w').write('7')\nprint(open('note.txt').read())": Outcome("ok", "7"),
        "print('\ud800')": Outcome("ok", "?"),
        "print('a' * 4095)": Outcome("ok", "a" * 4095),
    }
    assert dict(zip(programs, sandbox.run(list(programs)))) == programs
    assert sandbox.run([]) == []


def test_the_tasks_own_solutions_give_the_right_answers(shared: Sandbox) -> None:
    rng = random.Random(3)
    tasks = [problems.code_problem(rng) for _ in range(40)]
    programs = [problems.programmed(task, rng).removeprefix("<code>\n").removesuffix("</code>") for task in tasks]
    assert shared.run(programs) == [Outcome("ok", task.answer) for task in tasks]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(-999, 999), st.sampled_from(["x", "1 / 0", "fork"])), max_size=12), st.randoms())
def test_no_result_depends_on_order_or_company(
    shared: Sandbox, rows: list[tuple[int, str]], rng: random.Random
) -> None:
    programs = [f"import os\nx = {n}\nprint(x * x)\n{'os.fork()' if end == 'fork' else end}" for n, end in rows]
    expected = [Outcome("ok" if end == "x" else "error", str(n * n)) for n, end in rows]
    order = rng.sample(range(len(rows)), len(rows))
    assert shared.run([programs[at] for at in order]) == [expected[at] for at in order]


def test_same_hash_order_everywhere_but_fresh_randomness(sandbox: Sandbox) -> None:
    names = "print(list({'a', 'b', 'c', 'd', 'e', 'f', 'g'}))"
    chance = "import random\nprint(random.random())"
    one, two, three = sandbox.run([names, chance, names + "  # again"])
    assert one == three == Sandbox(LIMITS).run([names])[0]
    assert two.status == "ok"
    assert two != sandbox.run([chance])[0]


def test_equal_programs_of_a_batch_are_run_once(sandbox: Sandbox) -> None:
    """Members of a group often are equal; whoever draws lots gets no second draw by sending the program twice."""
    chance = "import random\nprint(random.random())"
    one, other, again = sandbox.run([chance, "print(1)", chance])
    assert one == again
    assert other.last_line == "1"


def test_too_long_programs_are_not_run(shared: Sandbox) -> None:
    fits, long = "print(1)#" + "é" * 2495, "print(1)#" + "é" * 2496
    assert len(fits.encode()) == 4999
    assert shared.run([long, fits, long]) == [Outcome("too_long", ""), Outcome("ok", "1"), Outcome("too_long", "")]


def test_installed_modules_are_there_but_replace_nothing(sandbox: Sandbox) -> None:
    spoil = "open('/installed/thief.py', 'w').write('hail = int')\nprint('spoilt')"
    swap = "import os\nos.replace('program.py', '/installed/thief.py')\nprint('spoilt')"
    use = "import thief\nprint(thief.hail())"
    outcomes = sandbox.run([use, spoil, swap, use, "import math\nprint(math.isqrt(9))", "import other\nprint(1)"])
    assert outcomes[0] == outcomes[3] == Outcome("ok", "all hail")
    assert outcomes[1] == outcomes[2] == outcomes[5] == Outcome("error", "")
    assert outcomes[4] == Outcome("ok", "3")


# ---- what a program may use ----


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "cpu"),
        ("import signal\nfor s in range(1, 32):\n    try: signal.signal(s, lambda *a: 0)\n"
         "    except Exception: pass\nwhile True: pass", "cpu"),
        ("x = 'a' * 10 ** 9", "memory"),
        ("x = []\nwhile True: x.append('a' * 10 ** 6)", "memory"),
        ("import mmap\nx = [mmap.mmap(-1, 2 ** 20) for _ in range(1000)]", "error"),
        ("while True: print('a' * 100)", "output"),
        ("print('a' * 10 ** 6)", "output"),
        ("import os\nwhile True:\n    try: os.write(1, b'a')\n    except OSError: break", "output"),
        ("import os\nos.ftruncate(1, 10 ** 9)", "error"),
        ("import os, sys\nos.posix_fallocate(1, 0, 10 ** 9)", "error"),
        ("import os\nos.abort()", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()", None),
        ("print(" + "(" * 2000 + ")" * 2000 + ")", None),
        ("import os\nos._exit(77)", "memory"),
        ("import os\nos._exit(78)", "killed"),
    ],
)  # fmt: skip
def test_passing_a_limit_ends_the_program_alone(shared: Sandbox, program: str, status: str | None) -> None:
    outcome = among_honest(shared, program)
    assert outcome.status == status if status else outcome.status != "ok"
    assert len(outcome.last_line) <= LIMITS.output_bytes


def test_limits_hold_without_nested_namespaces_too(shared: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "nested", False)
    programs = ["while True: pass", "x = 'a' * 10 ** 9", "print('a' * 10 ** 6)"]
    assert [o.status for o in shared.run([*programs, *HONEST])] == ["cpu", "memory", "output", *["ok"] * 3]


def test_sleepers_are_woken_for_good(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "limits", replace(LIMITS, wall_seconds=1.0))
    sleep = "import time\nprint(1, flush=True)\ntime.sleep(600)"
    deaf = "import os, signal, time\nsignal.signal(15, signal.SIG_IGN)\nos.close(1)\ntime.sleep(600)"
    assert sandbox.run([sleep, deaf]) == [Outcome("wall", "1"), Outcome("wall", "")]


@pytest.mark.parametrize("limit", ["one file", "many files"])
def test_disk_cannot_be_filled(sandbox: Sandbox, limit: str) -> None:
    one = "f = open('big', 'wb', 0)\nwhile True: f.write(b'a' * 1000)"
    many = "for i in range(2000): open(str(i), 'wb', 0).write(b'a' * 4000)"
    assert among_honest(sandbox, one if limit == "one file" else many) == Outcome("error", "")
    caught = f"import os\ntry:\n    {many}\nexcept OSError: pass\n"
    caught += "print(sum(os.path.getsize(f) for f in os.listdir()) <= 2 ** 20)"
    assert sandbox.run([caught, caught]) == [Outcome("ok", "True")] * 2


def test_bad_limits_and_modules_are_the_operators_mistake() -> None:
    with pytest.raises(ConfigError, match="wall_seconds must be greater than 0"):
        Limits(wall_seconds=0)
    with pytest.raises(ConfigError, match="plain module name"):
        Sandbox(installed={"../thief": ""})


def test_limits_too_tight_for_any_program_are_said(shared: Sandbox) -> None:
    with pytest.raises(ConfigError, match="raise the limits"):
        Sandbox(Limits(output_bytes=1))


# ---- what a program can see and reach ----


def lines(sandbox: Sandbox, program: str) -> str:
    outcome = among_honest(sandbox, program)
    assert outcome.status == "ok"
    return outcome.last_line


def test_no_files_but_the_interpreters(sandbox: Sandbox) -> None:
    standard, interpreter = sysconfig.get_path("stdlib"), str(Path(sys.base_prefix).resolve() / "bin")
    walk = f"""
import os
allowed = ({standard!r}, {interpreter!r}, '/etc/ld.so.cache', '/driver.py', '/installed/thief.py', '/installed/math.py',
           '/dev/null', '/dev/urandom', '/tmp/program.py')
found = [os.path.join(at, f) for at, _, files in os.walk('/') for f in files]
other = [f for f in found if not f.startswith(allowed) and '.so' not in f or '/site-packages' in f]
print(len(found) > 300, other[:5])
"""
    assert lines(sandbox, walk) == "True []"


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/maps", "/sys/kernel",
                                  str(Path.home() / ".bashrc"), str(Path(assay.__file__).parents[2] / "pyproject.toml"),
                                  __file__, "/dev/mem", "/root/.ssh/id_rsa", "/usr/bin/env"])  # fmt: skip
def test_files_outside_do_not_exist(sandbox: Sandbox, path: str) -> None:
    program = f"import os\nprint(os.path.lexists({path!r}))\nprint(open({path!r}, 'rb').read())"
    assert among_honest(sandbox, program) == Outcome("error", "False")


def test_nothing_can_be_written_but_the_private_folder(sandbox: Sandbox) -> None:
    program = """
import os
wrote = []
for at, folders, files in os.walk('/'):
    for name in ['new', *files[:3]]:
        path = os.path.join(at, name)
        if at == '/dev' and name != 'new' or at == '/tmp':
            continue
        try:
            open(path, 'ab').close()
            wrote.append(path)
        except OSError:
            pass
print(wrote, open('/tmp/new', 'w').write('abc'))
"""
    assert lines(sandbox, program) == "[] 3"


def test_no_environment_no_user_no_capabilities(sandbox: Sandbox) -> None:
    program = (
        SYSCALL
        + """
import os, struct
header, data = struct.pack('<Ii', 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, data) == 0
print(set(os.environ) - {'PWD', 'LC_CTYPE', 'PYTHONHASHSEED'}, os.getuid(), os.getgid(), data.raw == bytes(24), libc.prctl(39, 0, 0, 0, 0), os.uname().nodename)
"""
    )
    assert lines(sandbox, program) == "set() 65534 65534 True 1 sandbox"


def test_no_network(sandbox: Sandbox) -> None:
    program = """
import socket
tried = [(f, k) for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK)
         for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)]
opened = 0
for family, kind in tried:
    try:
        socket.socket(family, kind)
        opened += 1
    except PermissionError:
        pass
try:
    socket.socketpair()
    opened += 1
except PermissionError:
    pass
print(len(tried), opened)
"""
    assert lines(sandbox, program) == "18 0"


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.posix_spawn('/driver.py', ['x'], {})",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'print(1)'])",
        "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(1)'])",
        "import threading, time\nfor _ in range(10): threading.Thread(target=time.sleep, args=(9,)).start()",
        "import multiprocessing\nif __name__ == '__main__':\n    multiprocessing.Process(target=print).start()",
    ],
)
def test_no_second_process_or_thread(sandbox: Sandbox, bomb: str) -> None:
    assert among_honest(sandbox, bomb) == Outcome("error", "")


def test_refused_system_calls(sandbox: Sandbox) -> None:
    """Called raw, with arguments that would pass: every one fails with EPERM."""
    calls = driver.CALLS[os.uname().machine].denied
    program = (
        SYSCALL
        + f"""
libc.syscall.restype = ctypes.c_long
words = [ctypes.c_long(0)] * 6
left = []
for number in {calls!r}:
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *words) != -1 or ctypes.get_errno() != 1:
        left.append(number)
print(left)
"""
    )
    assert lines(sandbox, program) == "[]"


# ---- the others of the batch ----


@pytest.mark.parametrize(
    "hostile",
    [
        "import os\nos.kill(-1, 9)",
        "import os\nfor pid in range(1, 300):\n    os.kill(pid, 9)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        SYSCALL + "print([libc.ptrace(16, pid, 0, 0) for pid in range(1, 50)])\n1 / 0",
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b').write(b'x')",
        "import signal\nsignal.pidfd_send_signal(9, 9)\n",
        "import os\nos.pidfd_open(1)",
        "import builtins, math\nbuiltins.print = lambda *a: 1 / 0\nmath.isqrt = None\nprint(1)",
        "import os\n[os.open('/installed', 0) for _ in range(1000)]",
        "import sys, os\nsys.modules['__main__'].__dict__.clear()\nos._exit(1)",
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals['FRAME'] = None\n    frame = frame.f_back\n1 / 0",
    ],
)
def test_other_programs_cannot_be_disturbed(sandbox: Sandbox, hostile: str) -> None:
    assert among_honest(sandbox, hostile).status == "error"


def test_programs_see_no_process_and_no_descriptor(sandbox: Sandbox) -> None:
    program = """
import os
held = []
for fd in range(4096):
    try:
        held.append((fd, os.fstat(fd).st_rdev == os.stat('/dev/null').st_rdev))
    except OSError:
        pass
print(held, os.path.exists('/proc/self'))
"""
    assert lines(sandbox, program) == "[(0, True), (1, False), (2, True)] False"


def test_first_process_of_a_namespace_of_its_own(shared: Sandbox) -> None:
    if not shared.nested:
        pytest.skip("this machine forbids nested namespaces")
    assert lines(shared, "import os\nprint(os.getpid(), os.getppid(), os.listdir('/proc'))") == "1 0 []"


def test_nothing_is_left_for_the_next_program(sandbox: Sandbox) -> None:
    leave = "import os, time\nprint(sorted(os.listdir('/tmp')))\nopen('/tmp/left', 'w').write('answer')\nopen('random.py', 'w')"
    assert sandbox.run([leave] * 6) == [Outcome("ok", "['program.py']")] * 6


def test_forged_results_are_mere_output(sandbox: Sandbox) -> None:
    """Frames as the driver writes them, for every index: they count as what they are, a program's own text."""
    frames = b"".join(driver.FRAME.pack(index, 0, 2) + b"13" for index in range(7))
    forge = f"import os\nfor fd in range(64):\n    try: os.write(fd, {frames!r})\n    except OSError: pass"
    outcome = among_honest(sandbox, f"{forge}\nprint()\nprint('RESULT 0 ok 13')")
    assert outcome == Outcome("ok", "RESULT 0 ok 13")


def test_memory_holds_nothing_of_other_programs(shared: Sandbox) -> None:
    """A program's process is cloned from the driver: neither texts nor outputs of others may be in what it inherits.

    /proc is hidden, so the scan reads the pages around the heap and around objects of all kinds, through a pipe, which
    refuses what is not mapped. A secret of the scan's own shows that it would find one.
    """
    secret, printed = "print('pine' + 'apple')", "pineapple"
    scan = (
        SYSCALL
        + """
import os, re
own = ''.join(['gold', 'en plum']) * 3
secrets = [re.compile(p) for p in (b"[p]ineapple", b"[p]ine' . 'apple", b"[g]olden plum")]
libc.sbrk.restype = ctypes.c_void_p
tops = {id(o) >> 20 for o in (object(), b'x' * 100, [0] * 10, libc, print, own, bytes(300), bytes(10 ** 5), re, 'x')}
places = {top + shift for top in tops for shift in range(-4, 5)} | {(libc.sbrk(0) >> 20) - back for back in range(16)}
r, w = os.pipe()
seen, hits = 0, [0, 0, 0]
for place in sorted(places):
    for at in range(place << 20, place + 1 << 20, 4096):
        if libc.write(w, ctypes.c_void_p(at), ctypes.c_size_t(4096)) == 4096:
            page = os.read(r, 4096)
            seen += 1
            hits = [hit + len(s.findall(page)) for hit, s in zip(hits, secrets)]
print(seen > 500, hits[0], hits[1], hits[2] > 0)
"""
    )
    outcomes = shared.run([*[secret] * 6, scan, *[secret] * 6, scan])
    assert outcomes[:6] == outcomes[7:13] == [Outcome("ok", printed)] * 6
    assert outcomes[6] == outcomes[13] == Outcome("ok", "True 0 0 True")


# ---- when bubblewrap itself fails ----


def inside(parent: int) -> list[int]:
    """Process ids of the bubblewraps that a process has started, and of what runs in them."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
    found = [pid for pid, above in parents.items() if above == parent]
    for pid in found:
        found += [child for child, above in parents.items() if above == pid]
    return [pid for pid in found if b"/driver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("victim", ["first", "last"])
def test_programs_without_a_result_run_again_alone(shared: Sandbox, victim: str) -> None:
    """The batch is killed from outside, once: its bubblewrap, or the innermost process that runs then."""
    outcomes: list[Outcome] = []
    slow = "import time\ntime.sleep(1)\nprint(42)"
    runner = threading.Thread(target=lambda: outcomes.extend(shared.run([*HONEST, slow, slow, slow, *HONEST])))
    runner.start()
    while not (pids := inside(os.getpid())) and runner.is_alive():
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[0] if victim == "first" else pids[-1], 9)
    runner.join()
    honest = [*outcomes[:3], *outcomes[6:]]
    assert honest == list(EXPECTED * 2)
    assert {o.status for o in outcomes[3:6]} <= {"ok", "killed"}
    assert not inside(os.getpid())


def wrapper(folder: Path, text: str) -> Path:
    script = folder / "bwrap"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return script


def test_where_nested_namespaces_are_forbidden_each_program_gets_its_own_bubblewrap(
    shared: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("bwrap")
    if "--disable-userns" not in subprocess.run([str(real), "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this bubblewrap cannot forbid nested namespaces")
    wrapper(tmp_path, f'exec {real} --unshare-user --disable-userns "$@"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sandbox = Sandbox(LIMITS)
    assert not sandbox.nested
    assert sandbox.run([*HONEST, "1 / 0"]) == [*EXPECTED, Outcome("error", "")]


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Sandbox) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxMissing, match="apt-get install bubblewrap") as missing:
        Sandbox()
    assert isinstance(missing.value, ConfigError)
    assert "\n" not in str(missing.value)
    script = wrapper(tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    with pytest.raises(SandboxMissing, match=r"No permissions to create new namespace.*allow unprivileged user"):
        Sandbox()
    script.chmod(0o644)
    with pytest.raises(SandboxMissing, match="not installed"):
        Sandbox()
    monkeypatch.setattr(shared, "_bwrap", str(script))
    with pytest.raises(SandboxMissing, match="does not start"):
        shared.run(["print(1)"])
