import re

import pytest

from data_pipelines.sources import text
from data_pipelines.sources.text import decode, document_text, text_fault


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("a film", ""),
        ("\x01 \u2603 \U0001f600", ""),
        ("", "empty"),
        (" \t\u3000\n", "empty"),
        ("a\0b", "NUL at character 2"),
        ("ab\ud83d", r"lone surrogate U\+D83D at character 3"),
        (decode(b"caf\xe9"), "not UTF-8: byte 0xe9 at character 4"),
    ],
)
def test_text_fault(value: str, fault: str) -> None:
    assert re.search(fault, text_fault(value)) if fault else text_fault(value) == ""


def test_document_text_takes_off_a_byte_order_mark_and_bounds_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert document_text(b"\xef\xbb\xbfgood\r\n") == ("good\r\n", "")
    assert document_text(b"caf\xe9", "latin-1") == ("caf\u00e9", "")
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 3)
    assert document_text(b"four")[1] == text.TOO_LONG
