"""Helpers for the tests of sources."""

from collections.abc import Callable

import pytest

from data_pipelines.sources import BadExample, Example, Source, open_source

Documents = list[Example | BadExample]


def read_split(source: Source, split: str) -> Documents:
    return [e for part in source.parts(split) for e in source.examples(split, part)]


@pytest.fixture(scope="session")
def read() -> Callable[[Source, str], Documents]:
    """Returns read(source, split): all that the split's parts yield, in order."""
    return read_split


@pytest.fixture(scope="session")
def read_all() -> Callable[..., Documents]:
    """Returns read_all(spec, **options): all that the splits of a source yield."""

    def all_of(spec: str, **options: object) -> Documents:
        source = open_source(spec, **options)
        return [e for split in source.splits for e in read_split(source, split)]

    return all_of


@pytest.fixture(autouse=True)
def no_proxy_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a socket fails: no source may ask the network for anything."""
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a source opened a connection: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
