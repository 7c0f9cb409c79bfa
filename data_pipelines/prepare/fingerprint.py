"""Names unfinished work by all that decides it, so that a later prepare can reuse it."""

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path

from data_pipelines.durable import make_folder
from data_pipelines.sources import Source


def fingerprint(source: Source) -> bytes:
    """Returns bytes that change with the source's options and with the files that it names."""
    buffer = io.BytesIO()
    collector = _FileCollector(buffer)
    collector.dump(source)
    return buffer.getvalue() + repr(sorted(collector.files.items())).encode()


class _FileCollector(pickle.Pickler):
    """Notes the size and time of the files that a pickled object names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.files: dict[str, tuple[int, int]] = {}

    def persistent_id(self, value: object) -> None:
        if isinstance(value, str | Path) and os.path.isfile(value):
            status = os.stat(value)
            self.files[str(value)] = (status.st_size, status.st_mtime_ns)


def digest(*values: bytes) -> str:
    """Returns a short digest of byte strings."""
    found = hashlib.sha256()
    for value in values:
        found.update(len(value).to_bytes(8, "big") + value)
    return found.hexdigest()[:16]


def keyed_folder(parent: Path, kind: str, key: str) -> Path:
    """Returns parent/KIND-KEY, created if missing, and removes others of its kind."""
    wanted = parent / f"{kind}-{key}"
    make_folder(wanted)
    for path in parent.glob(f"{kind}-*"):
        if path != wanted:
            shutil.rmtree(path)
    return wanted
