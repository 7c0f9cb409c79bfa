import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import InputError
from trainer.distribution.node_list import MAX_HOSTS, expand_counts, expand_hosts

NAMES = st.from_regex(r"[a-z]{1,4}", fullmatch=True)
RANGES = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))


def written(start: int, length: int, width: int) -> tuple[str, list[str]]:
    """Returns a range such as 08-11 and its numbers."""
    numbers = [f"{n:0{width}d}" for n in range(start, start + length + 1)]
    return (f"{numbers[0]}-{numbers[-1]}" if length else numbers[0]), numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.lists(RANGES, max_size=3), NAMES), min_size=1, max_size=4))
def test_what_is_written_is_read(items: list) -> None:
    text, hosts = [], []
    for prefix, ranges, suffix in items:
        parts = [written(*each) for each in ranges]
        if not parts:
            text.append(prefix)
            hosts.append(prefix)
            continue
        text.append(f"{prefix}[{','.join(part for part, _ in parts)}].{suffix}")
        hosts += [f"{prefix}{n}.{suffix}" for _, numbers in parts for n in numbers]
    assert expand_hosts(",".join(text), "X") == hosts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1, max_size=5))
def test_counts(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)
    assert expand_counts(text, "X") == [count for count, times in runs for _ in range(times)]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab019[],-.(x) ", max_size=12))
def test_any_text_is_read_or_refused_with_its_name(text: str) -> None:
    for expand in (expand_hosts, expand_counts):
        try:
            assert expand(text, "THE_NAME")
        except InputError as error:
            assert "THE_NAME" in str(error)


def test_several_brackets_run_like_digits() -> None:
    assert expand_hosts("a[1-2]b[3-4]:80", "X") == ["a1b3:80", "a1b4:80", "a2b3:80", "a2b4:80"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a,",
        ",a",
        "a,,b",
        "a[",
        "a]",
        "a[]",
        "a[1-]",
        "a[3-1]",
        "a[1,]",
        "a[[1]]",
        "a[x]",
        "a b",
        f"a[1-{MAX_HOSTS + 1}]",
        "a[1-999][1-999]",
    ],
)
def test_what_is_no_list_of_hosts(text: str) -> None:
    with pytest.raises(InputError, match="X="):
        expand_hosts(text, "X")


@pytest.mark.parametrize("text", ["", "1,", "2(x)", "(x2)", "-1", "a", "1(x999999999)", "1(x0)"])
def test_what_is_no_list_of_counts(text: str) -> None:
    with pytest.raises(InputError, match="X="):
        expand_counts(text, "X")
