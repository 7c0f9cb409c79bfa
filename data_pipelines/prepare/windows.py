"""Texts together, as many as fit in bounded memory."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class HasText(Protocol):
    """What holds a document, as an Example and a Row do."""

    @property
    def text(self) -> str:
        """The document."""
        ...


Item = TypeVar("Item", bound=HasText)


def windows(items: Iterable[Item], most_items: int, most_characters: int) -> Iterator[list[Item]]:
    """Yields the items in order, in lists that end at `most_items` or `most_characters`.

    A text longer than that ends the list that it is in.
    """
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
