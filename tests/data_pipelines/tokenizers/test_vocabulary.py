import functools
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import InputError
from data_pipelines.tokenizers import vocabulary
from data_pipelines.tokenizers.vocabulary import character_line, line_character


@functools.cache
def every_character() -> list[str]:
    return [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]


@pytest.mark.seconds
def test_every_character_has_a_line_of_its_own_and_comes_back() -> None:
    lines = [character_line(character) for character in every_character()]
    assert len(set(lines)) == len(lines)
    assert [line_character(line) for line in lines] == every_character()
    vocabulary.check_lines(lines)  # no white space, none reserved


@pytest.mark.seconds
def test_a_file_of_every_character_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(vocabulary.lines_bytes([character_line(c) for c in every_character()]))
    assert vocabulary.read_pieces(path, "character") == every_character()


@pytest.mark.parametrize(
    ("character", "line"),
    [
        ("a", "a"),
        ("é", "é"),
        ("\\", "\\"),
        ("U", "U"),
        ("日", "日"),
        ("🎬", "🎬"),
        (" ", "U+0020"),
        ("\n", "U+000A"),
        ("\0", "U+0000"),
        ("\u0301", "U+0301"),
        ("\u2028", "U+2028"),
        ("\U0010ffff", "U+10FFFF"),
    ],
)
def test_lines_are_readable(character: str, line: str) -> None:
    assert character_line(character) == line


@pytest.mark.parametrize(
    "line", ["", "ab", " ", "U+0061", "U+000a", "U+A", "U+110000", "U+D800", "U+00000A", "\u0301"]
)
def test_other_lines_are_refused_with_their_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(vocabulary.lines_bytes(["a", line]))
    with pytest.raises(InputError, match="vocab.txt, line 5: "):
        vocabulary.read_pieces(path, "character")
