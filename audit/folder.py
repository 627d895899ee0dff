"""Read an untrusted record folder: bounded in files, bytes and depth; links are named and never followed."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common import UserError, parse_json
from eval.logs import RunLog, parse_log

MAX_FILES = 500
MAX_DEPTH = 5
MAX_TEXT = 2_000_000  # bytes read of one file; of a longer log its two ends
MAX_LOGS = 24
ARTIFACTS = "artifact*.bin"
RECIPE_FILES = {"recipe.toml", "README.md", "recipe.small.toml", "keys.toml"}
LIMIT_16MB = 16_000_000


class Track(NamedTuple):
    """What a track limits; None: no limit."""

    name: str
    limit_bytes: int
    train_s: float | None
    eval_s: float | None
    eval_text_bytes: int | None  # the text that eval_s is meant for; longer texts get more, in proportion
    has_contest_text: bool  # scores the contest's 50,000 validation documents
    is_record: bool  # rows must beat the last one with three seeds

    def eval_limit(self, num_bytes: float | None) -> float | None:
        if self.eval_s is None or self.eval_text_bytes is None:
            return self.eval_s
        return self.eval_s * num_bytes / self.eval_text_bytes if num_bytes else None


TRACKS = {
    track.name: track
    for track in (
        Track("track_10min_16mb", LIMIT_16MB, 600.0, 600.0, None, True, True),
        Track("track_non_record_16mb", LIMIT_16MB, None, None, None, True, False),
        Track("track_cpu", 1_000_000, 300.0, 180.0, 500_000, False, True),
    )
}


class File(NamedTuple):
    """A directory entry below the folder; `kind` is file, link or other (fifo, device, socket)."""

    path: str
    size: int
    kind: str


class SubmissionFolder:
    """The files of a folder by relative path, and what kept it from being read whole."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"{root}: expected a record folder, found none. Name a folder of records/.")
        self.root = root.resolve()
        self.notes: list[str] = []
        self.files = {file.path: file for file in self._scan(self.root, 0)}

    def _scan(self, folder: Path, depth: int) -> Iterator[File]:
        if depth > MAX_DEPTH:
            self.notes.append(f"folders deeper than {MAX_DEPTH} were not read")
            return
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        if len(entries) > MAX_FILES:
            self.notes.append(f"{len(entries):,} entries in one folder: only {MAX_FILES} were read")
        for entry in entries[:MAX_FILES]:
            path = Path(entry.path).relative_to(self.root).as_posix()
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                yield from self._scan(Path(entry.path), depth + 1)
            else:
                kind = {stat.S_IFLNK: "link", stat.S_IFREG: "file"}.get(stat.S_IFMT(info.st_mode), "other")
                yield File(path, info.st_size, kind)

    def named(self, pattern: str) -> list[str]:
        """Return the regular files whose path matches a glob pattern, sorted."""
        files = sorted(path for path, file in self.files.items() if file.kind == "file")
        return [path for path in files if PurePosixPath(path).match(pattern)]

    def read(self, path: str) -> bytes:
        """Return a regular file's bytes; of one over MAX_TEXT its first and last halves."""
        descriptor = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                return b""
            if info.st_size <= MAX_TEXT:
                return file.read(MAX_TEXT)
            self.notes.append(f"{path} has {info.st_size:,} bytes: only its two ends were read")
            head = file.read(MAX_TEXT // 2)
            file.seek(-(MAX_TEXT // 2), os.SEEK_END)
            return head + b"\n" + file.read(MAX_TEXT // 2)

    def text(self, path: str) -> str:
        """Return a file's text; bytes that are not UTF-8 turn into U+FFFD."""
        return self.read(path).decode("utf-8", errors="replace")


class Case(NamedTuple):
    """Everything that the checks look at, read once."""

    folder: SubmissionFolder
    track: Track
    readme: str
    submission: dict | None  # None: no submission.json, or one that is not a JSON object
    submission_error: str
    logs: list[RunLog]
    program: "Program"  # noqa: F821
    against: list[float] | None  # scores of the row to beat

    @property
    def declared(self) -> str:
        """What README, requirements and scripts say."""
        files = [*self.folder.named("requirements*.txt"), *self.folder.named("*.sh")]
        return self.readme + "".join(map(self.folder.text, files))

    @property
    def is_recipe_only(self) -> bool:
        return set(self.folder.files) <= RECIPE_FILES and "recipe.toml" in self.folder.files


def read_submission(folder: SubmissionFolder) -> tuple[dict | None, str]:
    """Return (submission.json or its only variant, error)."""
    variants = [name for name in folder.named("submission*.json") if "/" not in name]
    names = folder.named("submission.json") or variants
    if not names:
        return None, "no submission.json"
    try:
        facts = parse_json(folder.text(names[0]), names[0])
    except UserError as error:
        return None, str(error)
    return (facts, "") if isinstance(facts, dict) else (None, f"{names[0]} holds no JSON object")


def find_track(folder: SubmissionFolder, submission: dict | None) -> Track:
    """Return the track that the parent folder names, else submission.json, else the contest's."""
    words = re.sub(r"[^a-z0-9]+", "_", str((submission or {}).get("track", "")).lower())
    names = (folder.root.parent.name, words, f"track_{words}")
    return next((TRACKS[name] for name in names if name in TRACKS), TRACKS["track_10min_16mb"])


def read_logs(folder: SubmissionFolder) -> list[RunLog]:
    """Return the logs that state a score or another fact; the same text twice counts once."""
    names = [name for pattern in ("*.log", "*.txt") for name in folder.named(pattern)]
    names = [name for name in names if not PurePosixPath(name).name.startswith("requirements")]
    if len(names) > MAX_LOGS:
        folder.notes.append(f"{len(names)} logs: only {MAX_LOGS} were read")
    logs, seen = [], set()
    for name in names[:MAX_LOGS]:
        text = folder.text(name)
        if "val_bpb" not in text or text in seen:
            continue
        seen.add(text)
        log = parse_log(name, text)
        if log.scores or log.facts:
            logs.append(log)
    return logs
