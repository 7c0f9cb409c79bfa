"""Checks and decoding of a document's text."""

# A larger document is a mistake (an open quote, a binary file), and reading it whole could exhaust
# memory. A million English words are about 6 MB.
MAX_DOCUMENT_BYTES = 64 << 20
TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"
BOM = b"\xef\xbb\xbf"


def text_fault(text: str) -> str:
    """Returns why a text cannot be a document, or ""."""
    if not text or text.isspace():
        return "the text is empty"
    if "\0" in text:
        return f"the text holds a NUL at character {text.index(chr(0)) + 1}"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            if 0xDC80 <= code <= 0xDCFF:  # a byte that errors="surrogateescape" let through
                return f"not UTF-8: byte 0x{code - 0xDC00:02x} at character {error.start + 1}"
            return f"a lone surrogate U+{code:04X} at character {error.start + 1}"
    return ""


def decode(data: bytes) -> str:
    """Decodes UTF-8; `text_fault` finds the bytes that are not UTF-8 in the result."""
    return data.decode("utf-8", "surrogateescape")


def document_text(data: bytes, encoding: str = "utf-8") -> tuple[str, str]:
    """Returns the text of a whole document and why it is unusable (or "")."""
    if len(data) > MAX_DOCUMENT_BYTES:
        return "", TOO_LONG
    text = decode(data.removeprefix(BOM)) if encoding == "utf-8" else data.decode(encoding)
    return text, text_fault(text)
