"""`rt_polarity:`: sentences of film reviews from Rotten Tomatoes (Pang & Lee 2005)."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from data_pipelines.sources.archive import Archive
from data_pipelines.sources.lines import lines_of, strip_ending
from data_pipelines.sources.source import BadExample, Example
from data_pipelines.sources.splits import hash_split
from data_pipelines.sources.text import TOO_LONG, text_fault

PERCENTS = {"train": 80, "validation": 10, "test": 10}
LABELS = {"rt-polarity.neg": 0, "rt-polarity.pos": 1}


class RtPolarity:
    """rt-polarity.pos and rt-polarity.neg, a sentence a line, in Latin-1; see `Source`.

    The data set has no official split. Ids are FILE:LINE.

    Args:
        path: the folder or the tar archive (rt-polaritydata.tar.gz) that holds the two files.

    Raises:
        InputError: the path or one of the files is missing.
    """

    class_names: tuple[str, ...] = ("neg", "pos")
    splits = tuple(PERCENTS)

    def __init__(self, path: str) -> None:
        self.name = f"rt_polarity:{path}"
        self.note = f"{self.name}: 10 % validation, 10 % test by a hash of the text"
        self._archive = Archive(path)
        self._archive.require({name: _pattern(name) for name in LABELS})

    def parts(self, split: str) -> list[str]:
        """Returns the two files' names."""
        return list(LABELS)

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a file's sentences in its order."""

        def parse(name: str, where: str, file: BinaryIO) -> Iterator[Example | BadExample]:
            for number, line in enumerate(lines_of(file), 1):
                text = "" if line.data is None else strip_ending(line.data).decode("latin-1")
                if hash_split(text, PERCENTS) != split:
                    continue
                fault = TOO_LONG if line.data is None else text_fault(text)
                if fault:
                    yield BadExample(f"{where}, line {number}", fault)
                else:
                    yield Example(f"{part}:{number}", text, LABELS[part])

        wanted = re.compile(_pattern(part)).search
        yield from self._archive.parse(wanted, parse, report_links=split == "train")


def _pattern(name: str) -> str:
    return rf"(?:^|/){name}$".replace(".", r"\.")
