"""Flags as dataclass fields: one declaration gives parsing, bounds, help and shell completion.

`prepare`, the trainer and the launcher all declare their flags with `flag`. This module imports
none of their packages and nothing heavy, so that help and faults need no TensorFlow.

Example:
    @dataclass(frozen=True)
    class Options:
        workers: int = flag("Flags", 1, "Number of processes.", at_least=1)

    define([Options])
    faults, words = parse(sys.argv)
    options = from_flags(Options)
    faults += all_faults(options, compare)
"""

import copy
import dataclasses
import difflib
import math
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from absl import flags

Field = dataclasses.Field[Any]
Table = TypeVar("Table")
HELP_WORDS = frozenset({"--help", "-help", "--helpshort", "--helpfull", "-h"})
FLAGFILE_HELP = "File that holds flags, one a line. Flags after it override it."
_KINDS = {int: "an integer", float: "a finite number", bool: "true or false"}
# ASCII only: int() and float() also take 1_000, +4 and the digits of every script.
_NUMBERS = {int: r"-?[0-9]{1,18}", float: r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"}
_BOOLEANS = {"true": True, "false": False}
_BOUNDS = {
    "at_least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at_most": lambda value, bound: value <= bound,
    "below": lambda value, bound: value < bound,
}


@dataclass(frozen=True)
class Unreadable:
    """The value of a flag whose text is not of the flag's type."""

    text: str

    def __str__(self) -> str:
        return self.text


def flag(
    group: str, default: Any, help: str, *, choices: Sequence[str] = (), **bounds: float
) -> Any:
    """Returns a dataclass field that is also a flag.

    Args:
        group: Heading in the help.
        default: None if the flag has no value unless it is given.
        help: A phrase that can be understood without the flag's name.
        choices: The values that the flag may have.
        bounds: `at_least`, `above`, `at_most`, `below`.
    """
    metadata = {"group": group, "help": help, "choices": tuple(choices), "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(tables: Iterable[type]) -> dict[str, Field]:
    """Returns the fields of several dataclasses by name; those that they share, once."""
    return {item.name: item for table in tables for item in dataclasses.fields(table)}


def kind_of(item: Field) -> type:
    """Returns the type of a field's values: int, float, bool or str."""
    assert not isinstance(item.type, str)
    kinds = [kind for kind in typing.get_args(item.type) if kind is not type(None)]
    return kinds[0] if kinds else item.type


def choices_of(item: Field) -> tuple[str, ...]:
    """Returns the values that a flag may have, () if they are not few."""
    return item.metadata["choices"] or (tuple(_BOOLEANS) if kind_of(item) is bool else ())


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean X?" for the known word nearest to `word`, "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


class _Parser(flags.ArgumentParser[Any]):
    """Parses the text of a flag. `value_faults` reports what it cannot read."""

    def __init__(self, kind: type):
        self._kind = kind
        self.syntactic_help = _KINDS.get(kind, "")

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str) or self._kind is str:
            return argument
        if self._kind is bool:
            return _BOOLEANS.get(argument.lower(), Unreadable(argument))
        is_number = re.fullmatch(_NUMBERS[self._kind], argument)
        value = self._kind(argument) if is_number else math.nan
        return value if math.isfinite(value) else Unreadable(argument)

    def flag_type(self) -> str:
        return self._kind.__name__


def define(tables: Iterable[type], flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines an absl flag for each field of the dataclasses."""
    for item in fields_of(tables).values():
        flags.DEFINE(
            _Parser(kind_of(item)),
            item.name,
            item.default,
            item.metadata["help"],
            flag_values=flag_values,
            serializer=flags.ArgumentSerializer(),
            boolean=kind_of(item) is bool,
        )


def parse(
    argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS, advice: str = ""
) -> tuple[list[str], list[str]]:
    """Parses the command line into `flag_values`.

    Args:
        advice: Ends the fault of an unknown flag.

    Returns:
        Faults: unknown flags with the nearest known one, missing values, unreadable flagfiles,
        flags that a flagfile after them sets.
        Words that are not flags, and all that follow `--`.
    """
    flag_values.set_gnu_getopt()  # flags may follow words
    try:
        rest = flag_values(list(argv), known_only=True)[1:]
    except (flags.Error, UnicodeDecodeError, OSError) as error:
        flag_values.mark_as_parsed()
        why = "--flagfile: not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        return [why], []
    end = rest.index("--") if "--" in rest else len(rest)
    faults = list(_undone(argv[1:], flag_values))
    for word in rest[:end]:
        if word.startswith("-"):
            name = _written_name(word)
            hint = did_you_mean(name, flag_values, "--")
            faults.append(f"--{name} is not a flag of this program{hint}{advice}")
    words = [word for word in rest[:end] if not word.startswith("-")]
    return faults, words + rest[end + 1 :]


def _undone(words: Sequence[str], flag_values: flags.FlagValues) -> Iterator[str]:
    """Yields a fault for each flag that a flagfile after it sets to another value."""
    words = words[: words.index("--")] if "--" in words else words
    for place, word in enumerate(words):
        if not word.startswith("-") or _written_name(word) != "flagfile":
            continue
        file = words[place : place + 1 + ("=" not in word)]
        inside = {_name_of(w, flag_values): w for w in flag_values.read_flags_from_files(file)}
        later = {_name_of(w, flag_values) for w in words[place + len(file) :]}
        for given in words[:place]:
            name = _name_of(given, flag_values)
            if name in inside and name not in later and inside[name] != given:
                which = f"{'='.join(file)}, which has {inside[name]}"
                yield f"{given} is before {which}: write it after"


def _written_name(word: str) -> str:
    """Returns the name in --name, --name=value or --noname, with its no."""
    return word.lstrip("-").partition("=")[0]


def _name_of(word: str, flag_values: flags.FlagValues) -> str:
    """Returns the name of the flag that a word of the command line sets; "" for other words."""
    name = _written_name(word) if word.startswith("-") else ""
    return name.removeprefix("no") if name.removeprefix("no") in flag_values else name


def from_flags(
    table: type[Table], flag_values: flags.FlagValues = flags.FLAGS, **changes: Any
) -> Table:
    """Returns a `table` with the values of the parsed flags, and `changes` in place of some."""
    values = {item.name: flag_values[item.name].value for item in fields_of([table]).values()}
    return table(**values | changes)


def given(flag_values: flags.FlagValues, tables: Iterable[type]) -> dict[str, str]:
    """Returns the flags of the command line as they would be written, by name."""
    found = {name: flag_values[name] for name in fields_of(tables) if flag_values[name].present}
    return {
        name: f"--{name}" if each.value is True else f"--{name}={_written(each.value)}"
        for name, each in found.items()
    }


def value_faults(options: Any) -> list[str]:
    """Returns one line for each value that is not of its flag's type, choices or bounds."""
    return [fault for item in dataclasses.fields(options) for fault in _faults(item, options)]


def _written(value: Any) -> str:
    """Returns a value as it is written on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def all_faults(options: Table, compare: Callable[[Table], list[str]]) -> list[str]:
    """Returns the faults of single values, and those that `compare` finds between them.

    `compare` sees defaults in place of values that cannot be read. What it says about those flags
    is left out.
    """
    unreadable = [k for k, value in vars(options).items() if isinstance(value, Unreadable)]
    fields = fields_of([type(options)])
    readable = copy.copy(options)
    for name in unreadable:
        object.__setattr__(readable, name, fields[name].default)
    compared = [
        fault for fault in compare(readable) if not any(f"--{name}" in fault for name in unreadable)
    ]
    return value_faults(options) + compared


def _faults(item: Field, options: Any) -> Iterator[str]:
    value, choices = getattr(options, item.name), item.metadata["choices"]
    if isinstance(value, Unreadable) or (isinstance(value, float) and not math.isfinite(value)):
        yield f"--{item.name}={value} is not {_KINDS[kind_of(item)]}"
    elif value is None:
        return
    elif choices and value not in choices:
        hint = did_you_mean(value, choices)
        yield f"--{item.name}={value} is not one of {', '.join(choices)}{hint}"
    else:
        for name, bound in item.metadata["bounds"].items():
            if not _BOUNDS[name](value, bound):
                yield f"--{item.name}={value} must be {name.replace('_', ' ')} {bound}"


def help_text(fields: Iterable[Field]) -> str:
    """Returns the flags with their values, defaults and meanings, by group."""
    groups: dict[str, list[Field]] = {}
    for item in fields:
        groups.setdefault(item.metadata["group"], []).append(item)
    return "\n\n".join(
        "\n".join([f"{group}:", *map(_help_of, members)]) for group, members in groups.items()
    )


def _help_of(item: Field) -> str:
    values = "|".join(choices_of(item)) or kind_of(item).__name__
    default = "" if item.default in (None, "") else f"  (default: {_written(item.default)})"
    lines = textwrap.wrap(
        item.metadata["help"], width=88, break_long_words=False, break_on_hyphens=False
    )
    return "\n      ".join([f"  --{item.name}={values}{default}", *lines])


def program_help(title: str, tables: Iterable[type]) -> str:
    """Returns what a program's --help prints: `title`, then the flags of `tables`."""
    fields: Mapping[str, Field] = fields_of(tables)
    return f"{title.rstrip()}\n\n{help_text(fields.values())}\n\n--flagfile=FILE  {FLAGFILE_HELP}"
