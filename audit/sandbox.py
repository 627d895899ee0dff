"""Run an untrusted program: no network, no rights, no secrets, bounded time, memory, processes and output.

`Box` is a folder that holds a copy of the program and the data; programs run in folders of their own below
it. Namespaces come from util-linux's `unshare` where it works (the process namespace ends every descendant
with the first), the rest from inside.py. As root the program gets a user id that nobody else has, because
resource limits do not bind root.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from audit.probes import Event
from common import UserError, parse_json

HERE = Path(__file__).resolve().parent
INSIDE = ("inside.py", "shims.py")
FIRST_UID = 700_000  # above the ids that machines give away
MAX_OUTPUT = 4_000_000  # characters of a program's output
MAX_ANSWER = 64_000_000  # bytes of an answer of its scorer
MAX_WINDOW = 4096  # tokens
MAX_COPY = 60_000_000  # bytes of program files that are copied
MAX_COPIED_FILES = 2000
MAX_FOLDERS = 6  # levels
LEFT_OUT = {"runs", "records", "tests", "__pycache__", "node_modules", "datasets"}
NO_GPU = "#!/bin/sh\necho this machine has no GPU\n"  # scripts of the contest ask for it
NAMESPACES = ("--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child")


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float = 120.0  # of the wall clock, and of the processor by each process
    memory: int = 8 << 30  # bytes: address space of a process, and resident in all together
    file_bytes: int = 1 << 28
    processes: int = 96

    def as_resources(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": int(self.seconds) + 1, "RLIMIT_AS": self.memory, "RLIMIT_CORE": 0,
            "RLIMIT_FSIZE": self.file_bytes, "RLIMIT_NOFILE": 512, "RLIMIT_NPROC": self.processes,
        }  # fmt: skip


class Ran(NamedTuple):
    """What a program did."""

    status: int
    ended: str  # why it was ended from outside; empty when it ended itself
    lines: list[tuple[float, str]]  # (unix seconds, line) of its output
    trace: list[list]  # [unix seconds, event, argument, mode] as inside.py writes them
    folder: Path
    seconds: float

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def failure(self) -> str:
        """Why it did not end well, or "" when it did."""
        last = next((line for _, line in reversed(self.lines) if line.strip()), "no output")
        return "" if self.status == 0 and not self.ended else f"{self.ended or self.status}: {last[:160]}"


@cache
def namespace_command() -> tuple[str, ...]:
    """Return the command before a program that takes the network away; empty where none can be had."""
    for extra in ((), ("--user", "--map-root-user")):
        command = ("unshare", *extra, *NAMESPACES)
        with contextlib.suppress(OSError):
            done = subprocess.run([*command, "true"], capture_output=True, check=False, timeout=20)
            if done.returncode == 0:
                return command
    return ()


def list_processes(uid: int) -> Iterator[Path]:
    """Yield the folders of a user's processes in /proc."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if path.stat().st_uid == uid:
                yield path


def own_processes() -> int:
    """Count the processes and threads of this user: the limit counts them too."""
    return sum(len(list(path.glob("task/*"))) for path in list_processes(os.getuid()))


def resident_bytes(uid: int) -> int:
    """Return the resident memory of a user's processes."""
    pages = 0
    for path in list_processes(uid):
        with contextlib.suppress(OSError, IndexError):
            pages += int((path / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def copy_program(program: Path, target: Path) -> None:
    """Copy a program and the files beside it; links are left out, too much of it is an error."""
    left, count = MAX_COPY, 0
    todo = [(program.parent, target, 0)]
    while todo:
        source, made, depth = todo.pop()
        made.mkdir(exist_ok=True)
        with os.scandir(source) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name in LEFT_OUT or entry.is_symlink():
                    continue
                if entry.is_dir():
                    todo += [(Path(entry.path), made / entry.name, depth + 1)] * (depth < MAX_FOLDERS)
                elif entry.is_file() and (depth == 0 or entry.name.endswith((".py", ".toml", ".txt"))):
                    left, count = left - entry.stat().st_size, count + 1
                    if left < 0 or count > MAX_COPIED_FILES:
                        raise UserError(
                            f"{program.parent}: expected at most {MAX_COPIED_FILES} files of {MAX_COPY:,} "
                            "bytes beside the program, found more. Put the program into a folder of its own."
                        )
                    shutil.copy(entry.path, made / entry.name)


class Box:
    """A folder with a copy of a program, in which it can be run again and again."""

    def __init__(self, program: Path):
        if not program.is_file():
            raise UserError(f"{program}: expected a Python program, found none. Name a train_gpt.py.")
        self.root = Path(tempfile.mkdtemp(prefix="golf-audit-"))
        self.uid = FIRST_UID + os.getpid() % 100_000 if os.getuid() == 0 else 0
        self.count = 0
        self.processes: list[subprocess.Popen] = []
        self.root.chmod(0o711)
        for name in ("program", "inside", "data"):
            (self.root / name).mkdir()
        for name in INSIDE:
            shutil.copy(HERE / name, self.root / "inside" / name)
        (self.root / "inside" / "nvidia-smi").write_text(NO_GPU)
        copy_program(program.resolve(), self.root / "program")
        self.entry = self.root / "program" / program.name
        open_to_all(self.root)
        (self.root / "inside" / "nvidia-smi").chmod(0o755)

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.poll() is None:  # the audit itself was ended
                end(process)
        shutil.rmtree(self.root, ignore_errors=True)

    def add(self, file: Path) -> Path:
        """Put another file where the program can read it."""
        kept = self.root / "inside" / file.name
        shutil.copy(file, kept)
        kept.chmod(0o644)
        return kept

    def new_folder(self) -> Path:
        """Make the folder of one run: the program's working folder, its home and its temporary folder."""
        self.count += 1
        folder = self.root / f"run{self.count}"
        for path in (folder, folder / "home", folder / "tmp"):
            path.mkdir()
            if self.uid:
                os.chown(path, self.uid, self.uid)
        return folder

    def job(self, folder: Path, data: Path, limits: Limits, more: dict) -> dict:
        """Describe a run to inside.py."""
        extra = 0 if self.uid else own_processes()
        job = {
            "folder": str(folder), "entry": str(self.entry), "argv": [], "uid": self.uid, "shims": "",
            "limits": limits._replace(processes=limits.processes + extra).as_resources(),
            "readable": [str(self.root / name) for name in ("program", "inside")],
            "writable": [str(folder)], "trace": str(folder / "trace.jsonl"), "redirected": {},
            "spare": str(self.root / "spare" / folder.name) if namespace_command() else "",
            "recorded": str(folder / "recorded.jsonl"),
        }  # fmt: skip
        job["readable"] += [str(data), sys.prefix, sys.base_prefix, *more.pop("more_readable", ())]
        return job | more

    def start(self, job: dict, settings: dict[str, str], pass_fds: tuple = ()) -> subprocess.Popen:
        """Start a job with nothing in the environment but the settings and what Python needs."""
        folder = Path(job["folder"])
        environment = {
            "PATH": f"/usr/bin:/bin:{self.root}/inside", "HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp",
            "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "USER": "nobody",
        } | settings  # fmt: skip
        script = str(self.root / "inside" / INSIDE[0])
        command = [*namespace_command(), sys.executable, script, json.dumps(job)]
        process = subprocess.Popen(
            command, env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, pass_fds=pass_fds,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, data: Path, settings: dict[str, str], limits: Limits, **more) -> Ran:
        """Run the program to its end, or to that of a limit."""
        folder = self.new_folder()
        started = time.monotonic()
        process = self.start(self.job(folder, data, limits, more), settings)
        lines: list[tuple[float, str]] = []
        ended = collect(process, lines, limits, self.uid)
        end(process)
        seconds = round(time.monotonic() - started, 3)
        return Ran(process.wait(), ended, lines, read_trace(folder), folder, seconds)


def open_to_all(root: Path) -> None:
    """Let every user read a tree."""
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a program; the process namespace, where there is one, ends with its first process.

    `unshare` itself is left to reap that one, unless it has none.
    """
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with contextlib.suppress(OSError):
        inner = children.read_text().split() if namespace_command() else []
        for pid in inner:
            os.kill(int(pid), signal.SIGKILL)
        if not inner:
            os.killpg(process.pid, signal.SIGKILL)


def end(process: subprocess.Popen) -> None:
    """Kill a program and all that it has started."""
    kill_group(process)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout:
        process.stdout.close()


def collect(process: subprocess.Popen, lines: list, limits: Limits, uid: int) -> str:
    """Read the output with the time of each line until it ends; returns why it was cut short, or ""."""
    deadline, left, rest = time.monotonic() + limits.seconds, MAX_OUTPUT, b""
    looked = 0.0
    while True:
        if time.monotonic() > deadline:
            return f"ended after {limits.seconds:.0f} s"
        if uid and time.monotonic() - looked > 0.5:
            looked = time.monotonic()
            if resident_bytes(uid) > limits.memory:
                return f"ended: over {limits.memory >> 20:,} MiB of memory"
        if not select.select([process.stdout], [], [], 0.1)[0]:
            if process.poll() is not None:
                return ""
            continue
        data = os.read(process.stdout.fileno(), 65_536)
        if not data:
            process.wait(timeout=5)
            return ""
        left -= len(data)
        if left < 0:
            return f"ended after {MAX_OUTPUT:,} bytes of output"
        *whole, rest = (rest + data).split(b"\n")
        lines += [(time.time(), line.decode("utf-8", "replace")) for line in whole]


def read_trace(folder: Path) -> list[list]:
    """Return the traced events; what is no event (the program can write there) is passed over."""
    rows = []
    path = folder / "trace.jsonl"
    if not path.is_file() or path.is_symlink():
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file.read(MAX_OUTPUT).splitlines():
            with contextlib.suppress(UserError):
                row = parse_json(line, path, strict=False)
                if isinstance(row, list) and len(row) == 4 and all(isinstance(part, str) for part in row[1:]):
                    rows.append(row)
    return rows


class Server:
    """A program's scorer in the sandbox; `facts` says which protocol it has, "" for none."""

    def __init__(self, box: Box, data: Path, artifact: Path, settings: dict[str, str], limits: Limits):
        self.limits = limits
        folder = box.new_folder()
        kept = folder / artifact.name
        shutil.copy(artifact, kept)
        kept.chmod(0o644)
        (down, self.requests), (self.answers, up) = os.pipe(), os.pipe()
        job = box.job(folder, data, limits, {"requests": down, "answers": up, "artifact": str(kept)})
        self.process = box.start(job, settings, (down, up))
        os.close(down)
        os.close(up)
        self.lines: list[tuple[float, str]] = []
        self.ended = ""
        self.folder, self.rest, self.deadline = folder, b"", time.monotonic() + limits.seconds
        self.watcher = threading.Thread(target=self._watch, args=(box.uid,), daemon=True)
        self.watcher.start()
        try:
            self.facts = self._read_facts() if self._lives() else {"protocol": ""}
        except UserError:
            self.close()
            raise

    def _watch(self, uid: int) -> None:
        self.ended = collect(self.process, self.lines, self.limits, uid) or "ended"
        kill_group(self.process)

    def _lives(self) -> bool:
        """Wait for the first answer; False when the program ends without one."""
        while not select.select([self.answers], [], [], 0.1)[0]:
            if self.process.poll() is not None:
                return False
        peek = os.read(self.answers, 65_536)
        self.rest += peek
        return bool(peek)

    def _read_facts(self) -> dict[str, str | int]:
        """Read what the program says of its scorer; sizes that no miniature needs are not believed."""
        found = self._answer()
        sizes = {name: found.get(name, least) for name, least in (("window", 0), ("whole", 1))}
        if not all(isinstance(size, int) and 0 <= size <= MAX_WINDOW for size in sizes.values()):
            raise UserError(f"expected windows of at most {MAX_WINDOW} tokens, found {sizes}.")
        return {"protocol": str(found.get("protocol", ""))[:40], **sizes}

    def _answer(self) -> dict:
        while b"\n" not in self.rest:
            ready = select.select([self.answers], [], [], max(self.deadline - time.monotonic(), 0))[0]
            data = os.read(self.answers, 1 << 20) if ready else b""
            if not data or len(self.rest) > MAX_ANSWER:
                last = self.lines[-1][1][:160] if self.lines else ""
                raise UserError(f"the program's scorer gave no answer ({self.ended or 'time is up'}: {last})")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        try:
            answer = parse_json(line, "the program's scorer", strict=False)
        except UserError as error:
            raise UserError(f"the program's scorer answered no JSON: {line[:80]!r}") from error
        return answer if isinstance(answer, dict) else {}

    def ask(self, stream: np.ndarray) -> tuple[np.ndarray, list[Event]]:
        """Score a stream; returns the nats of its targets and the events; the program's words are checked."""
        with contextlib.suppress(BrokenPipeError):
            left = (json.dumps(stream.tolist()) + "\n").encode()
            while left:
                left = left[os.write(self.requests, left) :]
        answer = self._answer()
        try:
            nats = np.array(answer["nats"], dtype=np.float64).reshape(-1)
            return nats, [Event(str(kind), int(lo), int(hi)) for kind, lo, hi in answer["events"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the program's scorer answered no list of numbers: {error}") from error

    def close(self) -> None:
        """End the program."""
        os.close(self.requests)
        kill_group(self.process)
        self.watcher.join()
        end(self.process)
        os.close(self.answers)
