"""What the workers of a sweep share: Optuna's study, who works on which trial, trials whose worker is gone.

A worker claims a trial under a lock of the sweep's folder, and holds a lock of its own until it ends: a trial
whose worker's lock is free goes back to the queue with its number and its setting, and is tried again. Of
workers on other machines a sign of life in the study tells, because locks of a shared folder may not.
"""

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from common import UserError, atomic_file, parse_json
from dev.sweep.spec import Spec, combinations, load_optuna, make_pruner, make_sampler, why_refused
from durable.lock import acquire

JOURNAL_NAME, CLAIM_NAME, WORKERS_NAME = "journal.log", ".claim", "workers"
CLAIM_WAIT_S = 300.0  # for the lock under which trials are claimed, a moment each
SILENCE_S = 600.0  # without a sign of life after which a worker on another machine is gone
CREATE_STUDY, CREATE_TRIAL = 0, 4  # op codes of Optuna's journal
BEAT_S = 60.0  # between signs of life
STORAGE_PACKAGES = ("optuna", "sqlalchemy", "json")  # whose errors are the storage's
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError)  # of a damaged journal
MOST_TRIES = 3  # of a trial whose worker was killed: it may be the trial that kills
SKIPS_BEFORE_RANDOM, MOST_SKIPS = 10, 100  # settings in a row that are refused or known
PATIENCE_S = (1, 2, 4, 8, 16, 32)  # between attempts to write a result
# Attributes of a trial in the study. A skipped one was never trained and counts nowhere.
OWNER, TRIES, BEAT, SKIPPED, REASON, RUNS, RETRY_OF, LAST = (
    "owner", "tries", "beat", "skipped", "reason", "runs", "retry_of", "last",
)  # fmt: skip


class StorageGone(UserError):
    """The study cannot be read or written."""


class Board:
    """A study of Optuna as the workers of one sweep see it; `storage` is "" or the URL of a database."""

    def __init__(self, spec: Spec, folder: Path, storage: str = ""):
        self.spec, self.folder, self.url = spec, folder, storage
        self.optuna = load_optuna()
        self.states = self.optuna.trial.TrialState
        self.place = mask(storage) if storage else str(folder / JOURNAL_NAME)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self.lock: FileLock | None = None  # held while this worker lives
        self.seen: dict[int, tuple] = {}  # trial -> its last sign of life, and when it was first seen
        self.beaten_at = 0.0
        self.mended = ""  # what was done to the journal when it was opened
        (folder / WORKERS_NAME).mkdir(parents=True, exist_ok=True)
        with self.alone(), self.reached(is_new=True):
            self.study = self.open_study()

    # Opening

    def open_study(self):
        """Open the study, or begin it: with the recipe's own setting first, or all settings of a grid."""
        study = self.optuna.create_study(
            storage=self.open_storage(),
            study_name=self.spec.name,
            directions=["minimize"] * len(self.spec.objectives),
            load_if_exists=True,
            pruner=make_pruner(self.spec._asdict()),
        )
        begun, identity = study.user_attrs.get("spec"), self.spec.identity()
        if begun is None:
            study.set_user_attr("spec", identity)
        elif begun != identity:
            changed = [key for key in identity if begun.get(key) != identity[key]]
            raise UserError(
                f"{self.place}: the sweep {self.spec.name} was begun with another {', '.join(changed)} than "
                f"{self.spec.path} says now, so that its trials cannot be compared. Take another name or "
                "--storage, or put back what was changed."
            )
        if not study.get_trials(deepcopy=False):
            own = self.spec.own_values()
            is_grid = self.spec.sampler["kind"] == "grid"
            for values in combinations(self.spec.space) if is_grid else filter(None, [own]):
                study.enqueue_trial(values)
        return study

    def open_storage(self):
        """Open a database, or the journal in the sweep's folder."""
        storages = self.optuna.storages
        if self.url:
            return storages.RDBStorage(self.url, engine_kwargs=engine_options(self.url))
        path = str(self.folder / JOURNAL_NAME)
        lock = storages.journal.JournalFileOpenLock(path)
        self.mended = mend_journal(Path(path), lock)
        return storages.JournalStorage(storages.journal.JournalFileBackend(path, lock))

    @contextmanager
    def reached(self, is_new: bool = False) -> Iterator[None]:
        """Turn what goes wrong with the storage into a StorageGone that names it."""
        try:
            if not self.url and not is_new and not (self.folder / JOURNAL_NAME).is_file():
                raise FileNotFoundError("no such file")  # it would be begun anew, without what it said
            yield
        except UserError:
            raise
        except Exception as error:
            if not isinstance(error, OSError | ImportError) and not arises_in(error, STORAGE_PACKAGES):
                raise
            raise self.gone(error) from error

    def gone(self, error: Exception) -> StorageGone:
        """Say that the storage cannot be used."""
        if not self.url and isinstance(error, UNREADABLE):
            return StorageGone(damaged(self.place, f"{type(error).__name__}: {error}"))
        why = mask(" ".join(str(error.__cause__ or error).split()), self.url)[:300]
        return StorageGone(
            f"{self.place}: the sweep's storage cannot be read or written ({why}). Finished trainings are "
            "kept in the folder of the sweep: run this again when the storage is back, or with another one, "
            "and nothing is trained twice."
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock under which trials are claimed."""
        lock = FileLock(self.folder / CLAIM_NAME, thread_local=False)
        if not acquire(lock, CLAIM_WAIT_S):
            raise UserError(
                f"{self.folder}: another worker has held {CLAIM_NAME} for {CLAIM_WAIT_S:g} s, which takes a "
                "moment. Look whether a worker hangs, end it and run this again."
            )
        try:
            yield
        finally:
            lock.release()

    # What there is

    def trials(self) -> list:
        """List the trials that were or will be trained, in the order of their numbers."""
        with self.reached():
            found = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in found}
        return [t for t in found if SKIPPED not in t.user_attrs and t.number not in retried]

    def is_full(self) -> bool:
        """Whether all trials of the spec are there, trained or in work."""
        return len(self.trials()) >= self.spec.trials

    def is_over(self) -> bool:
        """Whether as many trials as wanted have ended."""
        return sum(t.state.is_finished() for t in self.trials()) >= self.spec.trials

    def in_work_here(self) -> bool:
        """Whether another worker of this machine has a trial."""
        host = socket.gethostname()
        running = [t for t in self.trials() if t.state in (self.states.RUNNING, self.states.WAITING)]
        return any(t.user_attrs.get(OWNER, {}).get("host", host) == host for t in running)

    # Claiming

    def enroll(self) -> None:
        """Take the lock that says that this worker lives; the system ends it with the process."""
        self.lock = FileLock(self.folder / WORKERS_NAME / self.worker, thread_local=False)
        acquire(self.lock, 0.0)

    def leave(self) -> None:
        """Let go of it."""
        if self.lock is not None:
            with suppress(OSError):
                (self.folder / WORKERS_NAME / self.worker).unlink(missing_ok=True)
            self.lock.release()

    def claim(self):
        """Return a trial for this worker with its setting chosen; None where there is none left."""
        with self.alone(), self.reached():
            self.free_lost()
            self.study.sampler = make_sampler(self.spec._asdict(), shift=len(self.study.get_trials(False)))
            for skips in range(MOST_SKIPS):
                if skips == SKIPS_BEFORE_RANDOM:  # a sampler may insist on what it knows to be good
                    self.study.sampler = self.optuna.samplers.RandomSampler()
                if self.is_full() and not self.study.get_trials(False, (self.states.WAITING,)):
                    return None
                trial = self.take()
                if trial is not None:
                    return trial
        return None

    def take(self):
        """Ask for a trial; None for one that is not to be trained, which is noted."""
        trial = self.study.ask()
        owner = {"worker": self.worker, "host": socket.gethostname(), "process": os.getpid()}
        trial.set_user_attr(OWNER, owner)
        values = self.spec.suggest(trial)
        tries = trial.user_attrs.get(TRIES, 0) + 1
        if tries > MOST_TRIES:
            self.fail(trial, f"its worker was killed or lost {MOST_TRIES} times; memory may be too small")
            return None
        skipped = self.same_as(trial) or why_refused(self.spec, values)
        if skipped:
            trial.set_user_attr(SKIPPED, skipped)
            self.study.tell(trial, state=self.states.FAIL)
            return None
        trial.set_user_attr(TRIES, tries)
        return trial

    def same_as(self, trial) -> str:
        """Name an earlier trial with the same setting, "" for none."""
        again = trial.user_attrs.get(RETRY_OF)
        twins = [t.number for t in self.trials() if t.params == trial.params]
        twins = [number for number in twins if number not in (trial.number, again)]
        return f"the same as trial {twins[0]}" if twins else ""

    def retry_failed(self) -> int:
        """Queue the settings of failed trials again; returns how many."""
        with self.alone(), self.reached():
            failed = [t for t in self.trials() if t.state == self.states.FAIL]
            for t in failed:
                self.study.enqueue_trial(t.params, user_attrs={RETRY_OF: t.number})
        return len(failed)

    # Workers that are gone

    def free_lost(self) -> None:
        """Put the trials of workers that are gone back into the queue."""
        for t in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            if self.is_lost(t):
                self.queue_again(t._trial_id)

    def is_lost(self, trial) -> bool:
        """Whether the worker of a trial in work is gone."""
        owner = trial.user_attrs.get(OWNER)
        if owner is None and not self.url:  # killed while it claimed: that lock is ours now
            return True
        if owner and owner["host"] == socket.gethostname():
            path = self.folder / WORKERS_NAME / owner["worker"]
            if path.is_file():
                return owner["worker"] != self.worker and self.is_free(path)
            if not self.url:  # it ended; of a database another folder may be the worker's
                return True
        sign, now = (owner, trial.user_attrs.get(BEAT)), time.monotonic()
        before, since = self.seen.get(trial.number, (None, now))
        self.seen[trial.number] = (sign, since if sign == before else now)
        return sign == before and now - since > SILENCE_S

    def is_free(self, path: Path) -> bool:
        """Whether nobody holds a worker's lock; removes one that is free."""
        lock = FileLock(path, thread_local=False)
        if not acquire(lock, 0.0):
            return False
        path.unlink(missing_ok=True)
        lock.release()
        return True

    def queue_again(self, trial_id: int) -> None:
        """Let a trial in work wait for a worker, with the setting that it has."""
        with suppress(self.optuna.exceptions.UpdateFinishedTrialError):  # its worker was not gone
            self.study._storage.set_trial_state_values(trial_id, self.states.WAITING)

    def beat(self, trial) -> None:
        """Give a sign of life, now and then; a storage that is away for a moment does not end a training."""
        now = time.monotonic()
        if now - self.beaten_at > BEAT_S:
            self.beaten_at = now
            with suppress(StorageGone), self.reached():
                trial.set_user_attr(BEAT, trial.user_attrs.get(BEAT, 0) + 1)

    # Ends of trials

    def report(self, trial, rung: int, loss: float) -> bool:
        """Note a trial's loss on a rung; returns whether to prune it, never while the storage is away."""
        with suppress(StorageGone), self.reached(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that is tried again has told its first rungs already
            trial.report(loss, rung)
            return trial.should_prune()
        return False

    def finish(self, trial, values: list[float], runs: list[dict], excess: dict[str, float]) -> None:
        """Write the values of a trial; excess: the share by which it is over each limit, at most 0 if not."""
        trial.set_user_attr(RUNS, runs)
        for name, share in excess.items():
            if name not in trial.constraints:
                trial.set_constraint(name, share)
        self.study.tell(trial, values)

    def prune(self, trial, last: dict) -> None:
        """End a trial that is worse than others were; last: the step and the loss that it came to."""
        trial.set_user_attr(LAST, last)
        self.study.tell(trial, state=self.states.PRUNED)

    def fail(self, trial, reason: str, is_bad: bool = False) -> None:
        """End a trial that failed; `is_bad`: by its setting, from which the sampler is to learn."""
        trial.set_user_attr(REASON, reason)
        learns = is_bad and len(self.spec.objectives) == 1
        self.study.tell(trial, state=self.states.PRUNED if learns else self.states.FAIL)

    def write(self, trial, end: Callable[[], None], tell: Callable[[str], None]) -> None:
        """Write the end of a trial; a storage that is away is waited for."""
        for pause in (*PATIENCE_S, None):
            try:
                with self.reached():
                    if self.study.trials[trial.number].state != self.states.RUNNING:
                        return tell(
                            f"trial {trial.number}: another worker has ended it, this result is left out"
                        )
                    return end()
            except StorageGone as error:
                if pause is None:
                    raise
                tell(f"{error} Trying again in {pause} s")
                time.sleep(pause)
        return None

    def release(self, trial) -> None:
        """Give up a trial in work: another worker takes it, or this one later."""
        with suppress(StorageGone), self.reached():
            self.queue_again(trial._trial_id)


def arises_in(error: Exception, packages: tuple[str, ...]) -> bool:
    """Whether an error was raised in code of one of these packages."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].partition(".")[0] in packages


def mask(text: str, url: str = "") -> str:
    """Hide the password of a database's URL."""
    secrets = [part.partition("@")[0].partition(":")[2] for part in (url or text).split("://")[1:]]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def engine_options(url: str) -> dict:
    """Return options of SQLAlchemy: SQLite waits for other writers, a lost connection is made again."""
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def has_begun(path: Path) -> bool:
    """Whether a journal holds a whole line."""
    return path.is_file() and b"\n" in path.read_bytes()


def mend_journal(path: Path, lock) -> str:
    """Cut off half a line that a killed writer left at a journal's end: Optuna would read no further.

    Returns what was done, "" for nothing. Raises a StorageGone where a line is none of a journal.
    """
    if not path.is_file():
        return ""
    lock.acquire()
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        check_journal(path, whole.splitlines())
        if whole == content:
            return ""
        with atomic_file(path) as file:
            file.write(whole)
    finally:
        lock.release()
    return f"{path}: half a line at its end, {len(content) - len(whole)} bytes, was cut off"


def check_journal(path: Path, lines: list[bytes]) -> None:
    """Raise for the first line of a journal that is none, or is of a study or trial that no line began."""
    num_trials = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line, path, strict=False)
            is_right = isinstance(entry["op_code"], int)
            is_right &= number > 1 or entry["op_code"] == CREATE_STUDY
            num_trials += entry["op_code"] == CREATE_TRIAL
            is_right &= entry.get("trial_id", -1) < num_trials
        except (UserError, LookupError, TypeError, AttributeError):
            is_right = False
        if not is_right:
            raise StorageGone(
                damaged(f"{path}", f"found {line[:40]!r}", f" at line {number} of {len(lines)}")
            )


def damaged(place: str, why: str, where: str = "") -> str:
    """Say that a journal cannot be read any more."""
    return (
        f"{place}: expected a journal of Optuna, which is damaged{where} ({why[:200]}). Copy it back from a "
        "backup, or start another name: finished trainings are kept and are found again."
    )
