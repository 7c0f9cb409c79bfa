import pytest

from data_pipelines.printable import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 \u65e5\u672c \U0001f600\n\ttext", "caf\u00e9 \u65e5\u672c \U0001f600\n\ttext"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("one\rtwo\x9b31m\x7f", r"one\rtwo\x9b31m\x7f"),
        ("abc\u202edcba\u2066", r"abc\u202edcba\u2066"),
        ("\udce9", r"\udce9"),
        (ValueError("\x1b"), r"\x1b"),
    ],
)
def test_unprintable_characters_are_written_out(text: object, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()
