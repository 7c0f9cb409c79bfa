"""HTML and SVG in which text cannot become markup: everything but `Markup` is escaped."""

import html
from collections.abc import Iterable
from typing import Any

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Markup(str):
    """Text that is HTML already; only `tag`, `join` and the page's constants make it."""


def escape(text: Any) -> Markup:
    """Returns `text` escaped for an element or a quoted attribute."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(str(text).encode("utf-8", "replace").decode(), quote=True))


def join(children: Any) -> Markup:
    """Returns the children joined: text, markup, None (left out), or iterables of them."""
    if children is None:
        return Markup("")
    if isinstance(children, Iterable) and not isinstance(children, str):
        return Markup("".join(join(child) for child in children))
    return escape(children)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Returns an element.

    Args:
        attributes: By name, `class_` for class and `aria_label` for aria-label. None and False
            leave one out; True writes its name alone.
    """
    written = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
