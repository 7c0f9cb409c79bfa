"""Small stores made by the real `prepare`, for all tests of this folder."""

import contextlib
import functools
import http.server
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.prepare import PrepareConfig, build_store
from data_pipelines.sources import Example
from data_pipelines.store.manifest import token_dtype
from data_pipelines.store.store_writer import finish_store, write_shard
from data_pipelines.store.token_store import TokenStore
from data_pipelines.tokenizers.vocabulary import digest, lines_bytes

WORDS = {"type": "word", "lowercase": True}

Documents = dict[str, list[tuple[str, int | None]]]


class ListSource:
    """A `Source` over (text, label) pairs given by split, in parts of `part_examples`."""

    name = "list"
    note = "made by a test"
    class_names = ("0", "1")

    def __init__(self, documents: Documents, part_examples: int = 1000) -> None:
        self._documents = documents
        self._part_examples = part_examples
        self.splits = tuple(documents)

    def parts(self, split: str) -> list[str]:
        return [str(n) for n in range(0, len(self._documents[split]), self._part_examples)]

    def examples(self, split: str, part: str) -> Iterator[Example]:
        first = int(part)
        pairs = self._documents[split][first : first + self._part_examples]
        for number, (text, label) in enumerate(pairs, start=first):
            yield Example(f"{split}-{number}", text, label)


@pytest.fixture(scope="session")
def list_source() -> type[ListSource]:
    """Returns the class, because tests cannot import this file."""
    return ListSource


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """Returns make_store(documents, name="store", part_examples=1000, **config) -> TokenStore."""

    def make(
        documents: Documents, name: str = "store", part_examples: int = 1000, **config: object
    ) -> TokenStore:
        values = {"vocab_size": 4, "min_count": 1, "source": "list", **config}
        source = ListSource(documents, part_examples)
        build_store(PrepareConfig(**values), source, tmp_path / name, log=lambda line: None)
        return TokenStore(tmp_path / name)

    return make


@pytest.fixture
def store(make_store: Callable[..., TokenStore]) -> TokenStore:
    """Returns a store of a few short documents: a, c and b are 6, 5 and 2 times in its text."""
    documents = {
        "train": [("a b c", 1), ("", 0), ("b a", 1), ("c c c c", 0), ("a", 1)],
        "test": [("a z", 0), ("b", 1)],
        "unsupervised": [("a a a", None)],
    }
    return make_store(documents, vocab_size=6, part_examples=2)


@functools.cache
def vocabulary(vocab_size: int) -> tuple[bytes, str]:
    vocab = lines_bytes([f"word{number}" for number in range(3, vocab_size)])
    return vocab, digest(WORDS, vocab)


@pytest.fixture(scope="session")
def write_store() -> Callable[..., TokenStore]:
    """Returns write_store(folder, documents, shards, vocab_size): documents are lists of ids.

    The first document goes to the first shard, the second to the second, and so on in turn; the
    label of each is its number modulo 2.
    """
    facts = {
        "source": "test",
        "note": "",
        "num_classes": 2,
        "tokenizer": WORDS,
        "prepare_config": {},
    }

    def write(folder: Path, documents: list[list[int]], shards: int, vocab_size: int) -> TokenStore:
        building = folder.with_name(folder.name + ".building")
        building.mkdir()
        entries = [
            write_shard(
                building,
                f"train-{number:05d}-of-{shards:05d}",
                [np.array(sum(documents[number::shards], []), np.int64)],
                np.array([len(document) for document in documents[number::shards]], np.int64),
                np.arange(len(documents))[number::shards] % 2,
                token_dtype(vocab_size),
            )
            for number in range(shards)
        ]
        vocab, sha256 = vocabulary(vocab_size)
        sizes = {"vocab_size": vocab_size, "vocab_sha256": sha256}
        finish_store(building, folder, vocab, {**facts, **sizes}, {"train": entries})
        return TokenStore(folder)

    return write


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges, as real servers do, and can break off."""

    break_off_after: int | None

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = self.translate_path(self.path)
        if not os.path.isfile(path):
            super().do_GET()  # lists a folder, or answers 404
            return
        data = Path(path).read_bytes()
        bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        start, stop = int(bounds[1]), min(int(bounds[2] or len(data)) + 1, len(data))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[start:stop][: self.break_off_after])


@pytest.fixture
def web() -> Iterator[Callable[..., str]]:
    """Returns web(folder, break_off_after=None), which starts a web server: its address."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path, break_off_after: int | None = None) -> str:
            handler = type("Handler", (RangeHandler,), {"break_off_after": break_off_after})
            serve = functools.partial(handler, directory=str(folder))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
