"""Small stores made by the real `prepare`, for all tests of this folder."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipelines.prepare import PrepareConfig, build_store
from data_pipelines.sources import Example
from data_pipelines.token_store import TokenStore

Documents = dict[str, list[tuple[str, int | None]]]


class ListSource:
    """A `Source` over (text, label) pairs given by split."""

    name = "list"
    note = "made by a test"
    num_classes = 2

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self.splits = tuple(documents)
        self.num_examples = sum(len(pairs) for pairs in documents.values())

    def examples(self, split: str) -> Iterator[Example]:
        for number, (text, label) in enumerate(self._documents[split]):
            yield Example(f"{split}-{number}", text, label)


@pytest.fixture(scope="session")
def list_source() -> type[ListSource]:
    """Returns the class, because tests cannot import this file."""
    return ListSource


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """Returns make_store(documents, name="store", **config) -> TokenStore."""

    def make(documents: Documents, name: str = "store", **config: object) -> TokenStore:
        values = {"vocab_size": 4, "min_count": 1, "source": "list", **config}
        build_store(
            PrepareConfig(**values), ListSource(documents), tmp_path / name, log=lambda line: None
        )
        return TokenStore(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def tfds_dir() -> str:
    """The folder of prepared TFDS data sets; skips the test where there is none."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "tensorflow_datasets"
    folder = os.environ.get("TFDS_DATA_DIR") or str(beside)
    if not (Path(folder) / "imdb_reviews").is_dir():
        pytest.skip(f"no prepared imdb_reviews in {folder}: set TFDS_DATA_DIR to test it")
    return folder
