from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from trainer.report_page.markup import Markup, escape, join, tag


class Reader(HTMLParser):
    """Notes what a browser would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, name: str, attributes: list) -> None:
        self.tags.append((name, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(markup: Markup) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


@given(st.text(), st.text())
def test_no_text_becomes_markup(text: str, value: str) -> None:
    found = seen(tag("p", text, title=value))
    assert [name for name, _ in found.tags] == ["p"]
    as_read = text.encode("utf-8", "replace").decode()
    assert found.text == as_read
    assert found.tags[0][1]["title"] == value.encode("utf-8", "replace").decode()


def test_a_script_stays_text() -> None:
    hostile = '</span><script>alert(1)</script>" onload="x'
    found = seen(tag("span", hostile, data_x=hostile))
    assert [name for name, _ in found.tags] == ["span"] and found.text == hostile
    assert found.tags[0][1] == {"data-x": hostile}


def test_elements_nest_and_attributes_are_named_as_in_html() -> None:
    inner = tag("em", "a & b")
    assert tag("p", [inner, None, " c"], class_="x", hidden=True, id=None, aria_label="y") == (
        '<p class="x" hidden aria-label="y"><em>a &amp; b</em> c</p>'
    )
    assert tag("meta", name="n") == '<meta name="n">'
    assert join(["<", Markup("<br>"), ["&"]]) == "&lt;<br>&amp;"


def test_lone_surrogates_do_not_stop_the_page() -> None:
    assert escape("a\udc80b") == "a?b"
