"""`textfiles:`: each file is a document."""

from collections.abc import Iterator

from data_pipelines import files
from data_pipelines.errors import InputError
from data_pipelines.sources.source import BadExample, Example, SourceOptions
from data_pipelines.sources.splits import describe, find_origins, hash_split, lay_out, short_names
from data_pipelines.sources.text import MAX_DOCUMENT_BYTES, document_text

PART_FILES = 1_000


class TextFiles:
    """Text files in UTF-8, without labels; see `Source`.

    Ids are the files' names relative to their deepest common folder.

    Args:
        pattern: see `splits.find_origins`.
        options: `with_labels`.

    Raises:
        InputError: no file matches.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, pattern: str, options: SourceOptions) -> None:
        self.name = f"textfiles:{pattern}"
        self._origins = find_origins(pattern)
        self._layout = lay_out(self._origins, False, draw=options.with_labels)
        self._short = short_names([p for paths in self._origins.values() for p in paths])
        self.splits = tuple(self._layout)
        self.note = f"{self.name}: {describe(self._layout)}; no labels"

    def parts(self, split: str) -> list[str]:
        """Returns groups of files."""
        total = len(self._origins[self._layout[split].origin])
        return [f"files {start}" for start in range(0, total, PART_FILES)]

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields the documents of a group of files, by the files' names."""
        origin, percents = self._layout[split]
        start = int(part.removeprefix("files "))
        for path in self._origins[origin][start : start + PART_FILES]:
            text, fault = _read(path)
            if percents and hash_split(text, percents) != split:
                continue
            yield BadExample(path, fault) if fault else Example(self._short[path], text, None)


def _read(path: str) -> tuple[str, str]:
    """Returns a file's text and why it cannot be a document (or "")."""
    try:
        with files.open_decompressed(path) as file:
            data = file.read(MAX_DOCUMENT_BYTES + 1)
    except (InputError, OSError) as error:
        return "", str(error)
    return document_text(data)
