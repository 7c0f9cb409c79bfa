from dataclasses import dataclass

import pytest
from absl import flags

from data_pipelines import flag_fields
from data_pipelines.flag_fields import did_you_mean, flag


@dataclass(frozen=True)
class Options:
    workers: int = flag("Size", 1, "Number of processes.", at_least=1, below=10)
    rate: float = flag("Size", 0.5, "Learning rate.", above=0, at_most=1)
    kind: str = flag("Kind", "a", "Kind of job.", choices=("a", "bcd"))
    port: int | None = flag("Kind", None, "Port to serve on.")
    quiet: bool = flag("Kind", False, "Print nothing.")


def compare(options: Options) -> list[str]:
    return [f"--workers={options.workers} with --rate={options.rate}"]


def parse(*words: str) -> tuple[Options, list[str], list[str], dict[str, str]]:
    values = flags.FlagValues()
    flag_fields.define([Options], values)
    faults, rest = flag_fields.parse(["program", *words], values)
    given = flag_fields.given(values, [Options])
    return flag_fields.from_flags(Options, values), faults, rest, given


WORDS = ("--workers=3", "a", "--rate", "1e-3", "--noquiet", "--", "-b")


def test_values_have_their_types_and_what_was_given_is_known() -> None:
    options, faults, words, given = parse(*WORDS)
    assert options == Options(workers=3, rate=0.001)
    assert (faults, words) == ([], ["a", "-b"])
    assert given == {"workers": "--workers=3", "rate": "--rate=0.001", "quiet": "--quiet=false"}
    assert parse("--port=7", "--quiet")[0] == Options(port=7, quiet=True)


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("--workers=0", "--workers=0 must be at least 1"),
        ("--workers=10", "--workers=10 must be below 10"),
        ("--rate=0", "--rate=0.0 must be above 0"),
        ("--rate=1.5", "--rate=1.5 must be at most 1"),
        ("--kind=bcde", "--kind=bcde is not one of a, bcd; did you mean bcd?"),
    ],
)
def test_bounds_and_choices(word: str, fault: str) -> None:
    assert flag_fields.value_faults(parse(word)[0]) == [fault]


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        (f"--workers={text}", "an integer")
        for text in ("", "+4", "1_0", "\uff14", "4.0", "1e2", " 4")
    ]
    + [(f"--rate={text}", "a finite number") for text in ("nan", "inf", "1_0", "0x1", "1e999", "")]
    + [("--quiet=maybe", "true or false"), ("--port=x", "an integer")],
)
def test_what_is_not_of_its_type_is_a_fault(word: str, kind: str) -> None:
    assert flag_fields.value_faults(parse(word)[0]) == [f"{word} is not {kind}"]


def test_values_are_compared_although_one_cannot_be_read() -> None:
    assert flag_fields.all_faults(Options(), compare) == ["--workers=1 with --rate=0.5"]
    options = parse("--port=x", "--kind=c")[0]
    assert flag_fields.all_faults(options, compare) == [
        "--kind=c is not one of a, bcd",
        "--port=x is not an integer",
        "--workers=1 with --rate=0.5",
    ]
    # Nothing is said about a value that nobody gave.
    options = parse("--rate=x")[0]
    assert flag_fields.all_faults(options, compare) == ["--rate=x is not a finite number"]


def test_an_unknown_flag_names_the_nearest_and_the_advice() -> None:
    values = flags.FlagValues()
    flag_fields.define([Options], values)
    faults, _ = flag_fields.parse(["program", "--workrs=2", "--zzz"], values, advice="; see --help")
    assert faults == [
        "--workrs is not a flag of this program; did you mean --workers?; see --help",
        "--zzz is not a flag of this program; see --help",
    ]
    assert did_you_mean("bcd", ["abcd", "x"]) == "; did you mean abcd?"


def test_help_groups_the_flags() -> None:
    assert flag_fields.program_help("What it does.", [Options]).splitlines()[:6] == [
        "What it does.",
        "",
        "Size:",
        "  --workers=int  (default: 1)",
        "      Number of processes.",
        "  --rate=float  (default: 0.5)",
    ]
