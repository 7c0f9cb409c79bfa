"""`aclimdb:` and `newsgroups20:`: each file is a document; folders name its split and label."""

import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from data_pipelines.errors import raise_if
from data_pipelines.sources.archive import Archive
from data_pipelines.sources.source import BadExample, Example
from data_pipelines.sources.splits import hash_split
from data_pipelines.sources.text import MAX_DOCUMENT_BYTES, document_text

PART_FILES = 1_000
TAR_PART = "archive"


class Layout(NamedTuple):
    """How a data set's folders are named."""

    pattern: str  # of a document's name, with the groups `split` and `label`
    labels: tuple[str, ...]  # the labels' folders, in the order of the classes
    unlabelled: str  # the folder of unlabelled documents, or ""
    encoding: str
    percents: Mapping[str, int]  # how the official training documents are divided
    note: str
    hashed: str = r"(?s)(.*)"  # the group is what the division hashes of a text


NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
    *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med"),
    *("sci.space", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast"),
    *("talk.politics.misc", "talk.religion.misc"),
)
LAYOUTS = {
    # Dai & Le 2015 hold 15 % of IMDB's labelled training set out; the same texts as in `tfds:`.
    "aclimdb": Layout(
        pattern=r"(?:^|/)(?P<split>train|test)/(?P<label>pos|neg|unsup)/[^/]+\.txt$",
        labels=("neg", "pos"),
        unlabelled="unsup",
        encoding="utf-8",
        percents={"train": 85, "validation": 15},
        note="official test split; validation is 15 % of the training reviews by a hash of "
        "the text",
    ),
    # The posts are of 1993 and declare no encoding; every byte is a character of Latin-1. Answers
    # quote posts of their thread: with some of it in training, validation would be too easy.
    # Lines of the archive's training posts end with tabs.
    "newsgroups20": Layout(
        pattern=r"(?:^|/)20news-bydate-(?P<split>train|test)/(?P<label>[^/]+)/[^/]+$",
        labels=NEWSGROUPS,
        unlabelled="",
        encoding="latin-1",
        percents={"train": 90, "validation": 10},
        note="split by date, headers kept; validation is 10 % of the training threads by a hash "
        "of the subject",
        hashed=r"(?i)(?:^|[\t\n])Subject:[ ]*(?:Re:[ ]*)*([^\t\n]*)",
    ),
}


class LabelledFolders:
    """The folder or the tar archive of a data set as it was published; see `Source`.

    Ids are the files' names, e.g. "train/pos/0_9.txt".

    Args:
        kind: one of `LAYOUTS`: "aclimdb" (Maas et al. 2011) or "newsgroups20" (20news-bydate).
        path: the folder or the archive.

    Raises:
        InputError: the path or one of the folders is missing.
    """

    def __init__(self, kind: str, path: str) -> None:
        self.name = f"{kind}:{path}"
        self._layout = LAYOUTS[kind]
        self.note = f"{self.name}: {self._layout.note}"
        self.class_names = self._layout.labels
        self.splits: tuple[str, ...] = ("train", "validation", "test")
        if self._layout.unlabelled:
            self.splits += ("unsupervised",)
        self._archive = Archive(path)
        self._names: dict[str, list[str]] = {"train": [], "test": [], "unsupervised": []}
        found = set()
        for name in self._archive.names:
            if match := re.search(self._layout.pattern, name):
                self._names[self._origin(match)].append(name)
                found.add((match["split"], match["label"]))
        self._check_folders(found)

    def _check_folders(self, found: set[tuple[str, str]]) -> None:
        layout = self._layout
        wanted = [(split, label) for split in ("train", "test") for label in layout.labels]
        wanted += [("train", layout.unlabelled)] if layout.unlabelled else []
        faults = [
            f"{self._archive.path} has no documents of {label} for {split}: "
            f"no file matches {layout.pattern}"
            for split, label in wanted
            if (split, label) not in found
        ]
        raise_if(faults)

    def _origin(self, match: re.Match[str]) -> str:
        return "unsupervised" if match["label"] == self._layout.unlabelled else match["split"]

    def parts(self, split: str) -> list[str]:
        """Returns groups of a folder's files; a tar archive is one part."""
        if self._archive.is_tar:
            return [TAR_PART]
        total = len(self._names["train" if split == "validation" else split])
        return [f"files {start}" for start in range(0, total, PART_FILES)]

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a part's documents: a folder's by name, an archive's in its order."""
        origin = "train" if split == "validation" else split

        def parse(name: str, where: str, file: BinaryIO) -> Iterator[Example | BadExample]:
            match = re.search(self._layout.pattern, name)
            assert match is not None  # it is one of `_names`
            text, fault = document_text(file.read(MAX_DOCUMENT_BYTES + 1), self._layout.encoding)
            if origin == "train" and self._split_of(text) != split:
                return
            label, label_fault = self._class_of(match["label"])
            if fault or label_fault:
                yield BadExample(where, fault or label_fault)
            else:
                yield Example(name[match.start() :].lstrip("/"), text, label)

        if part == TAR_PART:
            wanted = set(self._names[origin]).__contains__
            yield from self._archive.parse(wanted, parse, report_links=split != "validation")
        else:
            start = int(part.removeprefix("files "))
            names = self._names[origin][start : start + PART_FILES]
            yield from self._archive.parse_files(names, parse)

    def _split_of(self, text: str) -> str:
        found = re.search(self._layout.hashed, text)
        return hash_split((found and found[1]) or text, self._layout.percents)

    def _class_of(self, label: str) -> tuple[int | None, str]:
        if label == self._layout.unlabelled:
            return None, ""
        if label not in self._layout.labels:
            return None, f"folder {label!r} is not one of {', '.join(self._layout.labels)}"
        return self._layout.labels.index(label), ""
