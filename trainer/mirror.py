"""Copies a run's folder to an object store while it trains, and back to an empty folder.

    URL/objects/SHA256                     a file's content, under its digest
    URL/manifests/0000001002-WRITER.json   the state of the folder: path -> SHA-256 and size

Objects are written first, then the manifest that names them. So the newest manifest names a whole
state, wherever an upload was interrupted. The last KEPT_MANIFESTS stay; objects that none of them
names are removed.

Only the chief mirrors, in a thread: training never waits for the store. After an outage the thread
copies the folder as it is by then.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from data_pipelines.durable import flush_folder, remove
from data_pipelines.errors import InputError
from data_pipelines.object_store import (
    MissingError,
    ObjectStore,
    RefusedError,
    StoreError,
    patiently,
    pauses,
)
from data_pipelines.store.seal import seal_fault
from trainer.safe_files import (
    DamagedError,
    file_sha256,
    opened,
    read_json,
    replace_text,
    sealed,
)

FORMAT = "warmstate-mirror"
FORMAT_VERSION = 1
KEPT_MANIFESTS = 3
CLAIM = 1000  # a sitting's first number is so much above the last one: above what a lost one writes
MARKER = "mirror.json"  # in the run's folder: the manifests that it may be the newest state of
_LAST_PAUSE_SECONDS = 0.5  # between the tries of a run that ends
START_SECONDS = 120.0  # for a store that does not answer when a run starts
STOP_SECONDS = 60.0  # for the last upload of a run that was stopped
END_SECONDS = 300.0  # of one that has ended
# A run's own data set, profiles and logs of trackers stay, and what is being written.
EXCLUDED = {"store", "profile", "tensorboard", "unfinished", "run.lock", MARKER}
EXCLUDED_ENDINGS = (".new", ".old", ".replaced", ".partial", ".damaged", ".lock", ".building")
_IN_MEMORY_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 50
_FETCHED = "mirror.fetched.new"
_NAME = re.compile(r"(\d{10})-[0-9a-f]{12}\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Files = dict[str, list[Any]]  # path -> [SHA-256, size in bytes]


class BehindError(Exception):
    """The run has ended, and the store lacks its last state."""


@contextlib.contextmanager
def mirrored(
    url: str, folder: Path, is_new: bool, log: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Mirrors `folder` for the duration of the block; fetches it first if it holds no run.

    Yields:
        A function to call when a file is whole, which returns at once.

    Args:
        url: Of the store; "" for none.
        is_new: Whether the run starts again: what the store has is not fetched.

    Raises:
        InputError: The store refuses this run.
        BehindError: It could not be reached, at the start by an empty folder, or at the end.
    """
    if not url:
        yield lambda: None
        return
    mirror = Mirror(url, folder, log)
    mirror.start(is_new)
    try:
        yield mirror.changed
    except BaseException:
        mirror.close(STOP_SECONDS)
        raise
    if not mirror.close(END_SECONDS):
        raise BehindError(
            f"--mirror={url} lacks the run's last state ({mirror.fault or 'it is too slow'}); it "
            f"is in {folder}: run the same command again once the store is back"
        )


class Mirror:
    """The copy of one run's folder.

    Attributes:
        fault: Why the copy is behind, "" if it is not.
    """

    def __init__(self, url: str, folder: Path, log: Callable[[str], None]):
        self.fault = ""
        self._folder, self._log = folder, log
        self._flag = f"--mirror={url}"
        self._store = ObjectStore(url)
        self._writer = uuid.uuid4().hex[:12]
        self._scanner = _Scanner(folder)
        self._manifests: dict[str, Files] = {}  # that were read or written here, by name
        self._ours: list[str] = []  # the newest manifest is one of them, or somebody else writes
        self._written: Files = {}
        self._is_new = False
        self._is_begun = False
        self._suspects: set[str] = set()  # objects that had another content when fetched
        self._behind_since: float | None = None
        self._wake, self._hurry, self._ended = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    def start(self, is_new: bool) -> None:
        """Fetches the state if the folder is empty, and starts the thread.

        Raises:
            InputError: The store refuses the credentials, or holds another run or a later state
                than the folder.
            BehindError: The folder is empty and the store does not answer.
        """
        self._is_new = is_new
        is_empty = self._is_empty()
        with contextlib.suppress(DamagedError):
            names = read_json(self._folder / MARKER).get("manifests")
            self._ours = [name for name in names or [] if isinstance(name, str)]
        try:
            patiently(self._begin, START_SECONDS, self._log, f"mirror: {self._store.url}")
        except (MissingError, RefusedError) as error:
            raise InputError(f"{self._flag} cannot be used: {error}") from None
        except StoreError as error:
            if is_empty and not is_new:
                raise BehindError(
                    f"{self._flag} cannot be reached: {error}; it may hold a state of this run"
                ) from None
            self._fall_behind(error)
        self._wake.set()
        self._thread.start()

    def changed(self) -> None:
        """Wakes the thread: a checkpoint, a bundle or a report is whole."""
        self._wake.set()

    def close(self, seconds: float) -> bool:
        """Waits at most so long for the last upload; returns whether the store has the last state.

        A thread that is still busy ends with the process.
        """
        self._hurry.set()
        self._wake.set()
        self._thread.join(min(seconds, 2.0))
        if self._thread.is_alive():
            self._log(f"mirror: waiting up to {seconds:g} s for {self._store.url}")
            self._thread.join(seconds)
        is_done = not self.fault and not self._thread.is_alive()
        self._ended.set()
        self._thread.join(2 * _LAST_PAUSE_SECONDS)
        return is_done

    # --- At the start -----------------------------------------------------------------------------

    def _is_empty(self) -> bool:
        return not (self._folder / "config.json").exists()

    def _begin(self) -> None:
        """Fetches the newest state, or checks that it is this folder's; claims the store.

        From the claim on, an earlier sitting that still runs somewhere notices, and writes no more.
        """
        names = self._names()
        newest = next((name for name in reversed(names) if self._files_of(name)), "")
        files = {} if self._is_new else self._files_of(newest) or {}
        if newest and not self._is_new:
            if self._is_empty():
                files = self._fetch(names)
            elif names[-1] not in self._ours:
                raise InputError(
                    f"{self._flag} holds another run, or a later state of this one than "
                    f"--run_dir={self._folder}: name an empty --run_dir to continue from there, "
                    "another --mirror, or start again with --resume=never"
                )
        self._ours = names[-1:]
        self._write_manifest(files, CLAIM)
        self._is_begun = True

    def _fetch(self, names: list[str]) -> Files:
        """Fetches the newest whole state into the empty folder; returns its files.

        Raises:
            InputError: No state is whole.
        """
        place = self._folder / _FETCHED
        for name in reversed(names):
            files = self._files_of(name)
            if not files:
                continue
            try:
                for path, (sha256, size) in files.items():
                    self._download(place / path, sha256, size)
            except (MissingError, DamagedError) as error:
                self._log(f"warning: {self._flag}: {name} is not whole ({error}); trying an older")
                continue
            self._put_in_place(place, files, names)
            size = sum(size for _, size in files.values()) / 1e6
            self._log(f"mirror: fetched {len(files)} files, {size:.3g} MB, from {self._store.url}")
            return files
        raise InputError(
            f"{self._flag} holds no whole state: start again with --resume=never, or name another"
        )

    def _download(self, path: Path, sha256: str, size: int) -> None:
        """Fetches an object, unless an attempt before has.

        Raises:
            DamagedError: It has another content, each time.
        """
        for is_last in (False, True):
            with contextlib.suppress(DamagedError):
                if file_sha256(path, size) == sha256:
                    return
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(path)
            self._store.download(f"objects/{sha256}", path)
            if is_last and file_sha256(path, size) != sha256:
                self._suspects.add(sha256)
                raise DamagedError(f"object {sha256} of {path.name} has another content")

    def _put_in_place(self, place: Path, files: Files, names: list[str]) -> None:
        """Moves what was fetched to the run's folder; config.json last: without it, it is empty."""
        for path in sorted(place.rglob("*"), reverse=True):
            if path.is_dir():
                flush_folder(path)
            elif str(path.relative_to(place)) not in files:  # of a state that was not whole
                remove(path)
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
        tops = sorted({path.split("/")[0] for path in files}, key=lambda top: top == "config.json")
        for top in tops:
            if top == tops[-1]:
                self._note(names[-1:])
            remove(self._folder / top)  # of an attempt that was interrupted
            (place / top).rename(self._folder / top)
        flush_folder(self._folder)
        remove(place)

    # --- The thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        waits = pauses()
        while not self._ended.is_set():
            self._wake.wait()
            self._wake.clear()
            is_last = self._hurry.is_set()
            try:
                self._upload()
            except InputError as error:  # the folder and the store are of different runs
                return self._fall_behind(error)
            except Exception as error:  # whatever it is, training continues
                self._fall_behind(error)
                self._wake.set()
                self._hurry.wait(next(waits))
                if is_last:
                    time.sleep(_LAST_PAUSE_SECONDS)
                continue
            waits = pauses()
            self._catch_up()
            if is_last:
                return

    def _upload(self) -> None:
        """Copies the folder as it is now, and removes what is no longer named."""
        if not self._is_begun:
            self._begin()
        there = {n: s for n, s in self._store.sizes("objects").items() if n not in self._suspects}
        with self._scanner.scan(there) as (files, sources):
            if files == self._written and not sources:
                return
            for sha256, source in sources.items():
                name = f"objects/{sha256}"
                if source.data is not None:
                    self._store.write(name, source.data)
                else:
                    self._store.upload(f"/proc/self/fd/{source.file.fileno()}", name)
                there[sha256] = source.size
                self._suspects.discard(sha256)
        self._check_ours(self._names())
        self._write_manifest(files)
        self._remove_old(there)

    def _write_manifest(self, files: Files, above: int = 1) -> None:
        number = max((int(name[:10]) for name in self._ours), default=0) + above
        name = f"{number:010d}-{self._writer}.json"
        self._note([*self._ours[-1:], name])
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": files}
        self._store.write(f"manifests/{name}", sealed(values))
        self._ours = [name]
        self._manifests[name] = self._written = files

    def _remove_old(self, there: dict[str, int]) -> None:
        names = self._names()
        self._check_ours(names)
        if not names:
            raise StoreError("a manifest that was just written is not listed")
        kept = names[-KEPT_MANIFESTS:]
        needed = {sha256 for name in kept for sha256, _ in (self._files_of(name) or {}).values()}
        self._store.remove(f"manifests/{name}" for name in names[:-KEPT_MANIFESTS])
        self._store.remove(f"objects/{name}" for name in there.keys() - needed)

    def _check_ours(self, names: list[str]) -> None:
        if names and names[-1] not in self._ours:
            fault = "another sitting writes there by now, and this one no longer does"
            self._log(f"warning: {self._flag}: {fault}")
            self._ended.set()
            raise StoreError(fault)

    def _fall_behind(self, error: Exception) -> None:
        self.fault = str(error) or repr(error)
        if self._behind_since is None and not self._ended.is_set():
            self._behind_since = time.monotonic()
            self._log(
                f"warning: {self._flag}: {self.fault}; training continues; the copy "
                "follows once the store takes it"
            )

    def _catch_up(self) -> None:
        self.fault = ""
        if self._behind_since is not None:
            seconds = time.monotonic() - self._behind_since
            self._log(f"mirror: {self._store.url} is up to date again, after {seconds:.1f} s")
            self._behind_since = None

    # --- Manifests --------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Returns the manifests' names, oldest first."""
        return sorted(name for name in self._store.sizes("manifests") if _NAME.fullmatch(name))

    def _files_of(self, name: str) -> Files | None:
        """Returns the files of a manifest; None, after a line, if it is damaged."""
        if name and name not in self._manifests:
            try:
                self._manifests[name] = _files_in(self._store.read(f"manifests/{name}"))
            except (DamagedError, MissingError) as error:
                self._log(f"warning: {self._flag}: {name} is not read: {error}")
                return None
        return self._manifests.get(name)

    def _note(self, names: list[str]) -> None:
        """Records in the folder which manifests it may be the newest state of."""
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._folder / MARKER, json.dumps({"manifests": names}) + "\n")
        self._ours = names


@dataclass
class _Source:
    """A file that the store lacks: its bytes, or the open file if it is large.

    An open file can be read after it was removed.
    """

    size: int
    data: bytes | None
    file: BufferedReader


@dataclass
class _Scanner:
    """Reads a run's folder while the run writes it."""

    folder: Path
    _digests: dict[tuple[Any, ...], str] = field(default_factory=dict)  # by path and status

    @contextlib.contextmanager
    def scan(self, there: dict[str, int]) -> Iterator[tuple[Files, dict[str, _Source]]]:
        """Yields the folder's files, and sources of those that `there` (digest -> size) lacks.

        Checkpoints are read before what they may need: earlier metrics, and bundles.

        Raises:
            StoreError: The folder changes faster than it can be read.
        """
        for _ in range(20):
            with contextlib.ExitStack() as stack:
                before = self._listed()
                try:
                    files, sources = self._read(stack, before, there)
                except (DamagedError, OSError):  # removed meanwhile
                    continue
                if {p: s[0] for p, s in before.items()} != {
                    p: s[0] for p, s in self._listed().items()
                }:
                    continue
                yield files, sources
                return
        raise StoreError(f"{self.folder} changes faster than it can be read")

    def _listed(self) -> dict[str, tuple[int, int, int]]:
        """Returns (inode, size, time of change) of the folder's files, by path."""
        found = {}
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if _is_mirrored(name)]
            for name in filter(_is_mirrored, names):
                path = os.path.join(parent, name)
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(path)
                    if stat.S_ISREG(status.st_mode):
                        key = status.st_ino, status.st_size, status.st_mtime_ns
                        found[os.path.relpath(path, self.folder)] = key
        return dict(sorted(found.items(), key=lambda item: "checkpoints" not in item[0]))

    def _read(
        self,
        stack: contextlib.ExitStack,
        listed: dict[str, tuple[int, int, int]],
        there: dict[str, int],
    ) -> tuple[Files, dict[str, _Source]]:
        files: Files = {}
        sources: dict[str, _Source] = {}
        digests: dict[tuple[Any, ...], str] = {}
        for path, status in listed.items():
            key, size = (path, *status), status[1]
            sha256 = self._digests.get(key, "")
            if there.get(sha256) != size:
                file = stack.enter_context(opened(self.folder / path))
                # What is appended to must be read once.
                is_small = size <= _IN_MEMORY_BYTES or path.endswith(".jsonl")
                data = file.read(size) if is_small else None
                if data is not None:
                    size, sha256 = len(data), hashlib.sha256(data).hexdigest()
                elif not sha256:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                if there.get(sha256) != size:
                    sources[sha256] = _Source(size, data, file)
            digests[key] = sha256
            files[path] = [sha256, size]
        self._digests = digests
        return files, sources


def _is_mirrored(name: str) -> bool:
    return name not in EXCLUDED and not name.endswith(EXCLUDED_ENDINGS)


def _files_in(data: bytes) -> Files:
    """Returns the files that a manifest names.

    Raises:
        DamagedError: It is damaged, or names files outside of the folder.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DamagedError("it is no JSON") from None
    if not isinstance(values, dict) or seal_fault(values):
        raise DamagedError("it is damaged")
    files = values.get("files")
    known = (values.get("format"), values.get("format_version")) == (FORMAT, FORMAT_VERSION)
    if not known or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise DamagedError("it is not a manifest that this version reads")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    path, entry = item
    parts = path.split("/")
    if any(part in ("", ".", "..") or not _is_mirrored(part) for part in parts) or "\0" in path:
        return False
    if not isinstance(entry, list) or [*map(type, entry)] != [str, int]:
        return False
    return bool(_SHA256.fullmatch(entry[0])) and 0 <= entry[1] < _MAX_FILE_BYTES
