"""`cifar10:`: images as sequences of words (Krizhevsky 2009, the binary version).

Dai & Le 2015 (section 4.5) read an image a row at a time, 32 steps of 96 real numbers. Documents
here are words, so an image is one word a pixel, row by row: its grey value (ITU-R BT.601 luma) in
16 levels, g0 .. g15. It is a way to try the method on images, not the paper's experiment.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from data_pipelines.sources import BadExample, Example
from data_pipelines.sources.archive import Archive
from data_pipelines.sources.hash_split import hash_split

PERCENTS = {"train": 90, "validation": 10}
FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
NUM_CLASSES = len(CLASSES)
SIDE = 32
RECORD_BYTES = 1 + 3 * SIDE * SIDE
LEVELS = 16
READ_RECORDS = 500


class Cifar10:
    """data_batch_1.bin .. data_batch_5.bin and test_batch.bin; see `Source`.

    A document has 32 lines of 32 words. Ids are FILE:RECORD, from 0.

    Args:
        path: of the folder or the tar archive (cifar-10-binary.tar.gz).

    Raises:
        InputError: the path or one of the files is missing.
    """

    num_classes = NUM_CLASSES
    class_names = CLASSES
    splits: tuple[str, ...] = ("train", "validation", "test")

    def __init__(self, path: str) -> None:
        self.name = f"cifar10:{path}"
        self.note = (
            f"{self.name}: an image is 1,024 words, its pixels' grey values in 16 levels (the "
            "paper reads rows of real numbers); official test split; validation is 10 % of the "
            "official training images by a hash of the words"
        )
        self._archive = Archive(path)
        names = [name for names in FILES.values() for name in names]
        self._archive.require({name: _pattern(name) for name in names})

    def parts(self, split: str) -> list[str]:
        """Returns the files' names."""
        return list(FILES["test" if split == "test" else "train"])

    def examples(self, split: str, part: str) -> Iterator[Example | BadExample]:
        """Yields a file's images in its order."""

        def read(name: str, where: str, file: BinaryIO) -> Iterator[Example | BadExample]:
            number = 0
            while data := file.read(READ_RECORDS * RECORD_BYTES):
                whole = len(data) // RECORD_BYTES
                records = np.frombuffer(data, np.uint8, whole * RECORD_BYTES)
                for label, text in _texts(records.reshape(whole, RECORD_BYTES)):
                    if split == "test" or hash_split(text, PERCENTS) == split:
                        if label < NUM_CLASSES:
                            yield Example(f"{part}:{number}", text, label)
                        else:
                            fault = f"label {label} is not in 0 .. {NUM_CLASSES - 1}"
                            yield BadExample(f"{where}, record {number}", fault)
                    number += 1
                rest = len(data) - whole * RECORD_BYTES
                if rest and split != "validation":
                    fault = f"cut off: {rest} of {RECORD_BYTES} bytes"
                    yield BadExample(f"{where}, record {number}", fault)

        yield from self._archive.read(_pattern(part), read)


def _texts(records: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yields label and words of each record: uint8 [records, 3073]."""
    words = np.array([f"g{level}" for level in range(LEVELS)], object)
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE).astype(np.int32)  # red, green, blue
    grey = (299 * planes[:, 0] + 587 * planes[:, 1] + 114 * planes[:, 2] + 500) // 1000
    levels = grey * LEVELS // 256  # [records, rows, columns]
    for label, image in zip(records[:, 0].tolist(), words[levels].tolist(), strict=True):
        yield label, "\n".join(" ".join(row) for row in image)


def _pattern(name: str) -> str:
    return rf"(?:^|/){name}$".replace(".", r"\.")
