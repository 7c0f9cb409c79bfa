"""Groups texts so that a group fits in bounded memory."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class HasText(Protocol):
    """Anything that holds a document, such as an `Example` or a `Row`."""

    @property
    def text(self) -> str: ...


Item = TypeVar("Item", bound=HasText)


def windows(items: Iterable[Item], most_items: int, most_characters: int) -> Iterator[list[Item]]:
    """Yields the items in order, in lists that end at `most_items` or `most_characters`."""
    window: list[Item] = []
    characters = 0
    for item in items:
        window.append(item)
        characters += len(item.text)
        if len(window) == most_items or characters >= most_characters:
            yield window
            window, characters = [], 0
    if window:
        yield window
