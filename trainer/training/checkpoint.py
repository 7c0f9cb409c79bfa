"""Checkpoints: everything that an interrupted run needs to end as if it had never stopped.

    CHECKPOINTS/step-00000500/state.safetensors   every variable of the model and the optimizer
    CHECKPOINTS/step-00000500/state.json          the step, the SHA-256, and the loop's notes

Only the chief reads and writes. It broadcasts the state, so workers need no shared file system. The
data order is a function of the step and needs no state.

The chief writes in a separate thread while training continues, in pieces with pauses, so that the
steps meanwhile lose little. The thread hurries as soon as somebody waits for it: the next save,
the end, TERM. All workers learn then whether the write succeeded, and continue or stop together.
"""

import contextlib
import errno
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.durable import (
    DISCARDED,
    Buffer,
    discard,
    flush_file,
    flush_folder,
    remove,
    write_folder,
)
from data_pipelines.errors import InputError, TransientError
from trainer.distribution.distributor import Distributor
from trainer.distribution.variables import assign, digest
from trainer.safe_files import (
    DamagedError,
    UnreadableError,
    read_sealed,
    read_tensors,
    sealed,
    specs,
    tensor_parts,
)

FORMAT = "warmstate-checkpoint"
FORMAT_VERSION = 1
Restored = tuple[int, dict[str, Any], dict[str, np.ndarray]]  # step, notes, arrays
NAME = re.compile(r"step-(\d{8,12})")
RETRY_SECONDS = (0.1, 0.5, 2.0)  # pauses between tries to read a checkpoint
READ_TRIES = len(RETRY_SECONDS) + 1
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)  # of the process; a new one has its own
SHARE_OF_A_CORE = 0.03  # of the writing thread, while nobody waits for it
PACED_BYTES = 4 << 20  # smaller ones are written at once, in some milliseconds


class Checkpointer:
    """Saves and restores `variables` in `folder`.

    Args:
        errors: What to do when a checkpoint cannot be written: "stop" or "warn".
        keep_best: Number of checkpoints with the lowest `value` to keep as well.
        inputs: Flag -> digest of what the run reads: the store, and encoder bundles.

    Attributes:
        saved: Time of the last write in this process, by time.monotonic(); None before.
        flushed_first: Files of the run that are to be on the disk before a checkpoint is.
        written: Called, in the writing thread, after each write.
    """

    def __init__(
        self,
        folder: Path,
        distributor: Distributor,
        variables: Mapping[str, keras.Variable],
        log: Callable[[str], None],
        keep: int = 2,
        errors: str = "stop",
        keep_best: int = 0,
        inputs: Mapping[str, str] | None = None,
    ):
        self._folder = folder
        self._distributor = distributor
        self._variables = variables
        self._log = log
        self._keep = keep
        self._errors = errors
        self._keep_best = keep_best
        self._inputs = dict(inputs or {})
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._error, self._is_transient = "", False
        self.saved: float | None = None
        self.flushed_first: Sequence[Path] = ()
        self.written: Callable[[], None] = lambda: None

    def save(
        self,
        step: int,
        notes: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        value: float | None = None,
    ) -> None:
        """Starts to write the present state, once the write before has ended; a collective.

        Args:
            notes: Of the loop; anything that JSON can hold.
            arrays: Further tensors to save; they must not change afterwards.
            value: Rank of the state, lower is better; None if it was not evaluated.

        Raises:
            InputError: In every worker, if `errors` is "stop" and the write before failed. A
                TransientError if this process has too many open files.
        """
        self.wait()
        if not self._distributor.is_chief:
            return
        # These tensors do not change: a step that assigns to a variable whose memory is held gets
        # new memory. Copying here would delay the step.
        tensors = {name: tf.convert_to_tensor(v.value) for name, v in self._variables.items()}
        tensors |= {f"+{name}": array for name, array in (arrays or {}).items()}
        self._hurry.clear()
        self._thread = threading.Thread(
            target=self._write, args=(step, dict(notes), tensors, value), name=f"checkpoint {step}"
        )
        self._thread.start()

    def wait(self) -> bool:
        """Waits for the write, and returns whether it succeeded; a collective.

        Raises:
            InputError: As for `save`.
        """
        with self._distributor.watchdog.local_work():
            self.close()
        mine = [self._error, self._is_transient]
        error, is_transient = self._distributor.gather_objects(mine)[0]
        self._error, self._is_transient = "", False
        if error and self._errors == "stop":
            raise (TransientError if is_transient else InputError)(error)
        if error:
            self._log(f"warning: {error}")
        return not error

    def report(self, error: str, cause: OSError | None = None) -> None:
        """Makes `wait` report this error of the chief, which other workers cannot see."""
        if not self._error:
            self._error = error
            self._is_transient = cause is not None and cause.errno in NO_DESCRIPTORS

    def close(self) -> None:
        """Waits for the write; no collective, for a run that ends with an error."""
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._thread = None

    def forget(self) -> None:
        """Removes all checkpoints, for a run that starts again.

        Raises:
            InputError: In the chief: they cannot be removed.
        """
        if self._distributor.is_chief:
            forgotten = self._folder.with_name(self._folder.name + ".forgotten")
            try:
                remove(forgotten)
                if self._folder.exists():  # all at once: a run must not resume from what is left
                    self._folder.rename(forgotten)
                    flush_folder(self._folder.parent)
                    remove(forgotten)
            except OSError as error:
                raise InputError(
                    f"--resume=never: {self._folder} cannot be removed: {error.strerror}"
                ) from None

    def restore(self, before: int | None = None) -> Restored | None:
        """Sets the variables to the newest intact checkpoint; a collective.

        Damaged newer ones are renamed to NAME.damaged.

        Args:
            before: Only checkpoints of an earlier step count, and nothing is renamed.

        Returns:
            (step, notes, arrays) as saved, arrays in the chief only; None without checkpoints.

        Raises:
            InputError: In every worker: all checkpoints are damaged (they are left alone), or the
                newest intact one is of another model, or of another encoder.
        """
        state, tensors, error = None, {}, ""
        if self._distributor.is_chief:
            try:
                with self._distributor.watchdog.local_work():
                    state, tensors = self._read_newest(before) or (None, {})
            except InputError as found:
                error = str(found)
            except OSError as found:
                error = f"the checkpoints in {self._folder} cannot be read: {found.strerror}"
        state, error = self._distributor.gather_objects([state, error])[0]
        if error:
            raise InputError(error)
        if state is None:
            return None
        mine = {k: v for k, v in tensors.items() if not k.startswith("+")}
        chief = self._distributor.is_chief
        assign(self._variables, self._distributor.broadcast_arrays(mine if chief else None))
        kept = {k[1:]: v for k, v in tensors.items() if k.startswith("+")}
        return state["step"], state["notes"], kept

    def _write(
        self,
        step: int,
        notes: dict[str, Any],
        read: dict[str, tf.Tensor | np.ndarray],
        value: float | None,
    ) -> None:
        tensors = {name: np.asarray(tensor) for name, tensor in read.items()}
        beside = self._folder / "unfinished"
        is_paced = sum(tensor.nbytes for tensor in tensors.values()) > PACED_BYTES
        pause = _Pace(self._hurry) if is_paced else None
        state = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": step,
            "tensors": specs(tensors),
            "sha256": digest(tensors, pause),
            "notes": notes,
            "value": value,
            "inputs": self._inputs,
        }
        try:
            files: dict[str, bytes | Sequence[Buffer]] = {
                "state.safetensors": tensor_parts(tensors),
                "state.json": sealed(state),
            }
            for path in self.flushed_first:
                if path.exists():
                    flush_file(path)
            write_folder(beside, self._folder / f"step-{step:08d}", files, pause)
            self.saved = time.monotonic()
            self._remove_old()
            self.written()
        except OSError as error:
            self.report(self._what_to_do(step, error), error)
            with contextlib.suppress(OSError):  # frees the space of half a checkpoint
                remove(beside)
        except Exception as error:  # a thread's error would be lost
            self.report(f"the checkpoint of step {step} was not written: {error!r}")

    def _remove_old(self) -> None:
        """Removes all but the newest and the best."""
        remove(self._folder / DISCARDED)  # left where removing it failed
        folders = self._folders()
        older = folders[: -self._keep]
        if self._keep_best:
            values = {folder: _value_of(folder) for folder in folders}
            known = [folder for folder in folders if values[folder] < math.inf]
            ranked = sorted(known, key=lambda folder: values[folder])
            older = [folder for folder in older if folder not in ranked[: self._keep_best]]
        for folder in older:
            discard(folder)

    def _what_to_do(self, step: int, error: OSError) -> str:
        kept = []
        with contextlib.suppress(OSError):
            kept = self._folders()
        last = f"the last one written is {kept[-1]}" if kept else "there is none yet"
        return (
            f"the checkpoint of step {step} cannot be written in {self._folder}: {error.strerror}; "
            f"{last}: make room or make the folder writable, and run the same command again, or "
            "continue without checkpoints with --checkpoint_errors=warn"
        )

    def _folders(self) -> list[Path]:
        """Returns the checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def _read_newest(
        self, before: int | None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        faults: dict[Path, str] = {}
        for folder in reversed(self._folders()):
            if before is not None and _step_of(folder) >= before:
                continue
            try:
                state, tensors = _read_patiently(folder)
            except UnreadableError as error:
                raise InputError(
                    f"checkpoint {folder}: {error}, after {READ_TRIES} tries; it may be intact, so "
                    "it stays as it is: repair the file system and run the same command again"
                ) from None
            except DamagedError as error:
                faults[folder] = str(error)
                continue
            for damaged, fault in faults.items() if before is None else ():
                self._set_aside(damaged, fault)
            self._check_fits(folder, tensors)
            self._check_inputs(folder, state)
            return state, tensors
        if faults:
            raise InputError(
                "\n".join(f"checkpoint {folder}: {fault}" for folder, fault in faults.items())
                + f"\nno good checkpoint is left in {self._folder}: put one back, or start again "
                "with --resume=never"
            )
        return None

    def _set_aside(self, folder: Path, fault: str) -> None:
        aside = folder.with_name(folder.name + ".damaged")
        try:
            remove(aside)
            folder.rename(aside)
            done = f"it is now {aside.name}"
        except OSError as error:
            done = f"it cannot be renamed: {error.strerror}"
        self._log(f"checkpoint {folder} is damaged ({fault}); {done}; trying the one before")

    def _check_fits(self, folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
        """Raises InputError unless the tensors are those of the variables."""
        wanted = {k: [v.dtype, list(v.shape)] for k, v in self._variables.items()}
        found = {k: v for k, v in specs(tensors).items() if not k.startswith("+")}
        names = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if names:
            raise InputError(
                f"checkpoint {folder} is of another model: {names[0]!r} is "
                f"{found.get(names[0], 'not in it')}, but should be "
                f"{wanted.get(names[0], 'absent')} ({len(names)} differ); name another --run_dir, "
                "or start again with --resume=never"
            )

    def _check_inputs(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Raises InputError if the run began with other inputs, wherever they are now.

        Weights would come from one encoder and states from another, or a model would get another
        vocabulary. Old checkpoints record fewer inputs, and pass.
        """
        for flag, began_with in _inputs_of(state).items():
            found = self._inputs.get(flag, began_with)
            if found != began_with:
                raise InputError(
                    f"checkpoint {folder} is of a run that began with another {flag} than it has "
                    f"now: its SHA-256 was {began_with:.12}, and is {found:.12}; name the one that "
                    "it began with, or another --run_dir, or start again with --resume=never"
                )


class _Pace:
    """Pauses so long that a thread takes SHARE_OF_A_CORE, until it has to hurry."""

    def __init__(self, hurry: threading.Event):
        self._hurry = hurry
        self._used_seconds = time.thread_time()

    def __call__(self) -> None:
        used = time.thread_time() - self._used_seconds
        self._hurry.wait(used * (1 / SHARE_OF_A_CORE - 1))
        self._used_seconds = time.thread_time()


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the state and the tensors of one checkpoint.

    Raises:
        DamagedError: It is not as it was written.
        UnreadableError: A file cannot be read, which may be transient.
        InputError: A newer version of this program wrote it.
    """
    if folder.is_symlink():
        raise DamagedError(f"{folder} is a link")
    state = read_sealed(folder / "state.json")
    kinds = {"step": int, "tensors": dict, "sha256": str, "notes": dict}
    wrong = [name for name, kind in kinds.items() if type(state.get(name)) is not kind]
    inputs = _inputs_of(state)
    if type(inputs) is not dict or not all(type(digest) is str for digest in inputs.values()):
        wrong.append("inputs")
    version = state.get("format_version")
    if state.get("format") == FORMAT and type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            f"checkpoint {folder} has format {version}, of a newer warmstate; this one reads "
            f"{FORMAT_VERSION}: install the newer one, or name another --run_dir"
        )
    known = (state.get("format"), version) == (FORMAT, FORMAT_VERSION)
    if wrong or not known or state["step"] != _step_of(folder):
        raise DamagedError(f"{folder / 'state.json'} is not that of a checkpoint of this name")
    tensors = read_tensors(folder / "state.safetensors", state["tensors"])
    if digest(tensors) != state["sha256"]:
        raise DamagedError(f"{folder / 'state.safetensors'}: its SHA-256 does not match")
    return state, tensors


def _read_patiently(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns `read(folder)`; repeats it after an I/O error, which may be transient."""
    for seconds in RETRY_SECONDS:
        try:
            return read(folder)
        except UnreadableError:
            time.sleep(seconds)
    return read(folder)


def _inputs_of(state: Mapping[str, Any]) -> Any:
    """Returns the recorded inputs; "encoders" is what they were called before."""
    return state.get("inputs", state.get("encoders", {}))


def _value_of(folder: Path) -> float:
    """Returns a checkpoint's `value`, lower is better; infinity if it has none."""
    with contextlib.suppress(DamagedError):
        value = read_sealed(folder / "state.json").get("value")
        if type(value) is float and math.isfinite(value):
            return value
    return math.inf


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
