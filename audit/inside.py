"""The first thing that runs in the sandbox: give up every right, watch, then run the program.

A script of its own, copied into the sandbox: standard library only. Its argument is the job as JSON. In this
order: limits, user id, no new privileges, Landlock (nothing outside the sandbox can be written, of it only
the system and Python can be read), audit hook, stand-ins for CUDA, the program. With "requests" the program's
main does not run: its scorer answers token streams on two pipes, one JSON line each.
"""

import builtins
import ctypes
import io
import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Callable

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same on all machines
FILE_READ = 0b1101  # execute, read a file, list a folder
FILE_RIGHTS = 0x1FFF  # every right of Landlock's first version
TRUNCATE = 1 << 14  # from its third version on
NO_NEW_PRIVILEGES = 38
BIND, MOVE = 0x5000, 0x2000  # MS_BIND with MS_REC; MS_MOVE
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu")
SYSTEM += ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/dev/null", "/dev/urandom")
TRACED = {
    "open", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "socket.connect",
    "socket.getaddrinfo", "socket.sendto",
}  # fmt: skip
BORING = ("/usr/", "/lib", "/proc/", "/sys/", "/dev/", "/etc/", "<")


def private_parent(path: str) -> str:
    """Return the topmost folder on the way to a path that other users may not pass, or ""."""
    parts = path.rstrip("/").split("/")
    parents = ["/".join(parts[:end]) for end in range(2, len(parts) + 1)]
    return next((parent for parent in parents if not os.stat(parent).st_mode & 1), "")


def expose_folders(paths: list[str], spare: str) -> None:
    """Show folders that lie in private ones (a Python below /root) at their places, and nothing beside them.

    In this process's own mount namespace: an empty file system hides each private folder.
    """
    hidden = {path: private_parent(path) for path in map(os.path.realpath, paths)}
    hidden = {path: parent for path, parent in hidden.items() if parent}
    places = {path: f"{spare}/{number}" for number, path in enumerate(hidden)}
    for path, place in places.items():
        os.makedirs(place)
        mount(path, place, "", BIND)
    for parent in sorted(set(hidden.values())):
        mount("none", parent, "tmpfs", 0)
        os.chmod(parent, 0o755)
    for path, place in places.items():
        os.makedirs(path)
        mount(place, path, "", MOVE)


def mount(source: str, target: str, kind: str, flags: int) -> None:
    """Mount, or raise with the reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mounting {source} at {target} failed")


def confine_files(readable: list[str], writable: list[str]) -> bool:
    """Forbid writing outside `writable` and reading outside both and the system; False without Landlock."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if version < 1:
        return False
    rights = FILE_RIGHTS | (TRUNCATE if version >= 3 else 0)
    rules = libc.syscall(LANDLOCK_CREATE, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    for paths, allowed in ((readable + list(SYSTEM), FILE_READ), ([*writable, "/dev/null"], rights)):
        for path in filter(os.path.exists, paths):
            add_rule(libc, rules, path, allowed)
    return libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0


def add_rule(libc: ctypes.CDLL, rules: int, path: str, allowed: int) -> None:
    """Allow rights below a path; a file takes only those that files have."""
    if not os.path.isdir(path):
        allowed &= 0b0111 | TRUNCATE
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = allowed.to_bytes(8, "little") + descriptor.to_bytes(4, "little")
    libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0)
    os.close(descriptor)


def watch_events(path: str) -> None:
    """Append [seconds, event, argument, mode] for what the program opens, starts or calls."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    boring = (*BORING, *{os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)}, sys.prefix)

    def hook(event: str, args: tuple) -> None:
        if event not in TRACED:
            return
        name = str(args[0] if event != "socket.connect" else args[1])[:300]
        if event == "open" and (isinstance(args[0], int) or name.startswith(boring)):
            return
        row = [round(time.time(), 4), event, os.path.abspath(name) if event == "open" else name]
        os.write(descriptor, (json.dumps([*row, str(args[1])[:8]]) + "\n").encode())

    sys.addaudithook(hook)


def redirect_reads(redirected: dict[str, str]) -> list[str]:
    """Make reads of files with these names get others; returns the list of names that were asked for."""
    asked: list[str] = []
    plain = builtins.open

    def opened(file, mode="r", *args, **options):
        name = os.path.basename(os.fspath(file)) if not isinstance(file, int) else ""
        if name in redirected and not set(mode) & set("wax+"):
            asked.append(name)
            file = redirected[name]
        return plain(file, mode, *args, **options)

    builtins.open = io.open = opened
    return asked


def plain_scorer(names: dict, artifact: str) -> tuple[dict, Callable]:
    """Answer with `load(path)` and `score(model, tokens, note)`, loading afresh for every stream."""
    import numpy as np

    def score(stream: list[int]) -> tuple[list[float], list]:
        events: list[list] = []
        tokens = np.array(stream, dtype=np.uint16)

        def note(kind: str, lo: int, hi: int) -> None:
            events.append([kind, int(lo), int(hi)])

        nats = names["score"](names["load"](artifact), tokens, note)
        return [float(value) for value in nats], events

    return {"protocol": "load and score"}, score


def serve(names: dict, job: dict) -> None:
    """Answer streams until the pipe closes: {"nats": [...], "events": [[kind, lo, hi], ...]}."""
    requests, answers = os.fdopen(job["requests"], "r"), os.fdopen(job["answers"], "w")

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if callable(names.get("scorer")):
        facts, score = names["scorer"](job["artifact"])
        facts["protocol"] = "harness"
    elif callable(names.get("load")) and callable(names.get("score")):
        facts, score = plain_scorer(names, job["artifact"])
    else:
        say({"protocol": ""})
        return
    say(facts)
    for line in requests:
        nats, events = score(json.loads(line))
        say({"nats": nats, "events": events})


def main() -> None:
    """Do the job of the first argument."""
    job = json.loads(sys.argv[1])
    os.chdir(job["folder"])
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if job["uid"]:
        if job["spare"]:
            expose_folders([sys.prefix, sys.base_prefix], job["spare"])
        uid = job["uid"]
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    confine_files(job["readable"], job["writable"])
    watch_events(job["trace"])
    sys.path[0] = os.path.dirname(job["entry"])
    sys.argv = [job["entry"], *job["argv"]]
    if job["shims"]:
        path = sys.path[0]
        sys.path.insert(0, job["shims"])
        import shims

        shims.install(job["recorded"])
        sys.path[0:1] = [] if sys.path[1] == path else [path]
    if "requests" in job:
        serve(runpy.run_path(job["entry"], run_name="audited"), job)
        return
    asked = redirect_reads(job["redirected"])
    try:
        runpy.run_path(job["entry"], run_name="__main__")
    finally:
        if job["redirected"]:
            print(f"\nredirected_reads:{len(asked)}", flush=True)


if __name__ == "__main__":
    main()
