"""The file `vocab.txt`: one piece a line in UTF-8, the reserved ones first; line - 1 is the id.

A word or subword, which holds no white space, is a line. So is a character, unless it is hard to
see or would break the line: then the line is its number, `U+000A`. A byte is `0x00` .. `0xFF`.

Imports no TensorFlow.
"""

import hashlib
import json
import re
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import RESERVED

FIRST_ID = len(RESERVED)
BYTE_LINES = [f"0x{value:02X}" for value in range(256)]
# First and last of: white space, controls, combining marks, formats, private characters and
# unassigned ones. Written out, so that files do not depend on the installed version of Unicode.
_NUMBERED = (
    *((0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x300, 0x36F), (0x600, 0x605), (0x61C, 0x61C)),
    *((0x6DD, 0x6DD), (0x70F, 0x70F), (0x1680, 0x1680), (0x180B, 0x180F), (0x2000, 0x200F)),
    *((0x2028, 0x202F), (0x205F, 0x206F), (0x20D0, 0x20FF), (0x3000, 0x3000), (0xD800, 0xF8FF)),
    *((0xFDD0, 0xFDEF), (0xFE00, 0xFE0F), (0xFE20, 0xFE2F), (0xFEFF, 0xFEFF), (0xFFF0, 0xFFFC)),
    *((0xFFFE, 0xFFFF), (0xE0000, 0x10FFFF)),
)
_STARTS = [first for first, _ in _NUMBERED]


def is_character(text: str) -> bool:
    """Returns whether text is one Unicode character and no surrogate."""
    return len(text) == 1 and not "\ud800" <= text <= "\udfff"


def character_line(character: str) -> str:
    """Returns the line of one character."""
    code_point = ord(character)
    place = bisect(_STARTS, code_point) - 1
    numbered = place >= 0 and code_point <= _NUMBERED[place][1]
    return f"U+{code_point:04X}" if numbered else character


def line_character(line: str) -> str:
    """Returns the character of a line; raises ValueError if it is not the line of a character."""
    character = line
    if re.fullmatch(r"U\+[0-9A-F]{4,6}", line):
        character = chr(int(line[2:], 16))  # ValueError above U+10FFFF
    if not is_character(character) or character_line(character) != line:
        raise ValueError(f"{line!r} is not the line of a character")
    return character


def vocabulary_lines(vocab_path: str | Path) -> list[str]:
    """Returns the lines of a vocabulary without the reserved ones.

    Raises:
        InputError: the file is missing or no vocabulary.
    """
    try:
        lines = Path(vocab_path).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{vocab_path} cannot be read as a vocabulary: {error}") from error
    if tuple(lines[:FIRST_ID]) != RESERVED or lines[-1] != "":
        raise InputError(
            f"{vocab_path}: not a vocabulary: it must start with {', '.join(RESERVED)}, "
            "one a line, and end with a line break"
        )
    return lines[FIRST_ID:-1]


def read_pieces(vocab_path: str | Path, kind: str | None) -> list[str]:
    """Returns the pieces of a vocabulary, without the reserved ones: for bytes, their lines.

    Raises:
        InputError: the file is missing or not a vocabulary of this kind.
    """
    lines = vocabulary_lines(vocab_path)
    if kind == "byte" and lines != BYTE_LINES:
        raise InputError(f"{vocab_path}: not the vocabulary of bytes, 0x00 .. 0xFF")
    if kind != "character":
        return lines
    characters = []
    for number, line in enumerate(lines, start=FIRST_ID + 1):
        try:
            characters.append(line_character(line))
        except ValueError as error:
            raise InputError(f"{vocab_path}, line {number}: {error}") from None
    return characters


def piece_ids(vocab_path: str | Path, kind: str) -> dict[bytes, int]:
    """Returns the id of each piece of a vocabulary, as bytes, without the reserved ones.

    Raises:
        InputError: the file is missing or not a vocabulary of this kind.
    """
    pieces = [piece.encode() for piece in read_pieces(vocab_path, kind)]
    if kind == "byte":
        pieces = [bytes([value]) for value in range(256)]
    return {piece: number for number, piece in enumerate(pieces, start=FIRST_ID)}


def piece_lines(kind: str, pieces: Sequence[str]) -> list[str]:
    """Returns the lines of pieces; for bytes, all that there are."""
    if kind == "byte":
        return BYTE_LINES
    return [character_line(piece) for piece in pieces] if kind == "character" else list(pieces)


def lines_bytes(lines: Sequence[str]) -> bytes:
    """Returns the contents of `vocab.txt`, from its lines without the reserved ones."""
    return "".join(f"{line}\n" for line in (*RESERVED, *lines)).encode()


def digest(config: dict[str, Any], vocab_bytes: bytes) -> str:
    """Returns the hex digest of a tokenizer."""
    return hashlib.sha256(
        json.dumps(config, sort_keys=True).encode() + b"\n" + vocab_bytes
    ).hexdigest()


def check_lines(lines: Sequence[str]) -> None:
    """Raises InputError if pieces cannot be written as lines, or one is repeated."""
    seen = set(RESERVED)
    for number, line in enumerate(lines, start=FIRST_ID + 1):
        if not line or line.split() != [line]:
            raise InputError(f"vocabulary line {number}: {line!r} is empty or holds white space")
        if line in seen:
            raise InputError(f"vocabulary line {number}: {line!r} is repeated")
        seen.add(line)
