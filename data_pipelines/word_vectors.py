"""Word vectors in the text format of word2vec, GloVe and fastText.

A line is a word and its numbers, separated by spaces; the first line may give the number of words
and of dimensions. Only the requested words are kept.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import files
from data_pipelines.errors import InputError

MAX_WORD_BYTES = 1 << 12
MAX_NUMBER_BYTES = 64
LARGEST = float(np.finfo(np.float32).max)


def read_word_vectors(path: str, words: Sequence[str], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the vectors that a file has for `words`; the first one if a word is repeated.

    Args:
        path: a file, which may be compressed (see `files.open_decompressed`).
        words: case-sensitive.
        dim: dimensions of a vector.

    Returns:
        Indices of the words found, int64 [found], in the file's order, and float32 [found, dim].

    Raises:
        InputError: the file cannot be read, or a line is malformed; the message names the line. Of
            other words' lines only the length is checked.
    """
    places = {word.encode(): place for place, word in reversed(list(enumerate(words)))}
    found: dict[int, None] = {}
    vectors = np.empty((len(places), dim), np.float32)
    for number, line in _lines(path, dim):
        if number == 1 and _is_header(line, dim, path):
            continue
        word, *numbers = line.rsplit(b" ", dim)
        if len(numbers) != dim or not word:
            raise InputError(
                f"{path}, line {number} is not a word and {dim} numbers: {line[:60]!r}; vectors of "
                "another length need another --embedding_dim"
            )
        place = places.get(word)
        if place is None or place in found:
            continue
        vectors[len(found)] = _vector(numbers, path, number)
        found[place] = None
    return np.array(list(found), np.int64), vectors[: len(found)]


def _lines(path: str, dim: int) -> Iterator[tuple[int, bytes]]:
    """Yields each line's number, from 1, and its bytes without trailing white space."""
    longest = MAX_WORD_BYTES + dim * MAX_NUMBER_BYTES
    number = 0
    try:
        with files.open_decompressed(path) as file:
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest:
                    raise InputError(f"{path}, line {number} has more than {longest} bytes")
                yield number, line.rstrip(b" \r\n")
    except OSError as error:
        raise files.read_error(path, error, f"after line {number}") from error


def _is_header(line: bytes, dim: int, path: str) -> bool:
    """Returns whether the first line holds the counts instead of a vector.

    Raises:
        InputError: its number of dimensions is not `dim`.
    """
    fields = line.split(b" ")
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return False
    says = int(fields[1][:20])
    if dim == 1 and says != 1:
        return False  # a number as a word, and its vector
    if says != dim:
        raise InputError(
            f"{path} says in its first line that vectors have {says} numbers, but "
            f"--embedding_dim={dim}: set --embedding_dim={says}"
        )
    return True


def _vector(numbers: Sequence[bytes], path: str, line: int) -> list[float]:
    """Returns the numbers; raises InputError if one is not finite in float32."""
    found = []
    for text in numbers:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = math.nan if b"_" in text else float(text)
        if not abs(value) <= LARGEST:
            raise InputError(f"{path}, line {line}: {text[:60]!r} is not a finite number")
        found.append(value)
    return found
