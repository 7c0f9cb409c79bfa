"""Shell completion, generated from the flags: `warmstate completion bash|zsh|fish`.

The printed script holds all words, so that completing starts no program.
"""

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

from data_pipelines.errors import USAGE_EXIT_CODE
from data_pipelines.flag_fields import (
    FLAGFILE_HELP,
    Field,
    choices_of,
    did_you_mean,
    fields_of,
    flag,
    kind_of,
)
from warmstate.command import COMMANDS, flags_of


def bash() -> str:
    """Returns the completion of bash, which also completes values behind `=`."""
    cases = "\n".join(
        f"    {name}) flags={shlex.quote(' '.join(f'--{f.name}=' for f in _flags(name)))} ;;"
        for name in COMMANDS
        if _flags(name)
    )
    choices = {f.name: choices_of(f) for name in COMMANDS for f in _flags(name) if choices_of(f)}
    values = "\n".join(
        f'    --{flag}) COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$value")) ;;'
        for flag, words in sorted(choices.items())
    )
    return f"""\
# warmstate in bash: eval "$(warmstate completion bash)"
_warmstate() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} flag="" value="" flags
  COMPREPLY=()
  if [[ $COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($(compgen -W {shlex.quote(" ".join(COMMANDS))} -- "$word"))
    return
  fi
  # Bash cuts --flag=value in three.
  if [[ $word == "=" ]]; then
    flag=$before
  elif [[ $before == "=" ]]; then
    flag=${{COMP_WORDS[COMP_CWORD-2]}} value=$word
  fi
  if [[ -n $flag ]]; then
    case $flag in
{values}
    *) COMPREPLY=($(compgen -f -- "$value")) ;;
    esac
    return
  fi
  case ${{COMP_WORDS[1]}} in
    completion) COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$word")); return ;;
{cases}
    *) return ;;
  esac
  COMPREPLY=($(compgen -W "$flags" -- "$word"))
  [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
}}
complete -o filenames -F _warmstate warmstate
"""


def zsh() -> str:
    """Returns the completion of zsh."""
    commands = "\n".join(
        f"    {shlex.quote(f'{name}:{command.summary}')}" for name, command in COMMANDS.items()
    )
    cases = "\n".join(
        f"    {name}) _arguments {' '.join(_zsh_flag(f) for f in _flags(name))} '*:file:_files' ;;"
        for name in COMMANDS
        if _flags(name)
    )
    return f"""\
#compdef warmstate
# warmstate in zsh: eval "$(warmstate completion zsh)"
_warmstate() {{
  local -a commands
  commands=(
{commands}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT -= 1 ))
  case $command in
    completion) _values shell {" ".join(SHELLS)} ;;
{cases}
  esac
}}
compdef _warmstate warmstate
"""


def _zsh_flag(item: Field) -> str:
    escaped = "".join(f"\\{c}" if c in "[]:\\" else c for c in _first_sentence(item))
    values = f"({' '.join(choices_of(item))})" if choices_of(item) else "_files"
    return shlex.quote(f"--{item.name}=[{escaped}]:{kind_of(item).__name__}:{values}")


def fish() -> str:
    """Returns the completion of fish."""
    lines = [
        "# warmstate in fish: warmstate completion fish | source",
        "complete -c warmstate -f -n __fish_use_subcommand",
    ]
    shells = " ".join(SHELLS)
    lines.append(
        f"complete -c warmstate -f -n '__fish_seen_subcommand_from completion' -a '{shells}'"
    )
    for name, command in COMMANDS.items():
        about = _fish_quoted(command.summary)
        lines.append(f"complete -c warmstate -n __fish_use_subcommand -a {name} -d {about}")
        for item in _flags(name):
            words = " ".join(choices_of(item))
            values = f" -x -a {_fish_quoted(words)}" if words else " -r"
            lines.append(
                f"complete -c warmstate -n '__fish_seen_subcommand_from {name}' -l {item.name}"
                f"{values} -d {_fish_quoted(_first_sentence(item))}"
            )
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _first_sentence(item: Field) -> str:
    text: str = item.metadata["help"]
    return text.split(". ")[0].split("; ")[0].rstrip(".")


@dataclass
class _Flagfile:
    flagfile: str = flag("", "", FLAGFILE_HELP)


@functools.cache
def _flags(name: str) -> list[Field]:
    found = flags_of(name)
    return [*found, *fields_of([_Flagfile]).values()] if found else []


SHELLS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main(arguments: list[str]) -> int:
    """Prints the completion of the named shell; returns the exit code."""
    if len(arguments) == 1 and arguments[0] in SHELLS:
        print(SHELLS[arguments[0]](), end="")
        return 0
    given = " ".join(arguments)
    hint = did_you_mean(given, SHELLS)
    print(f"error: {given!r} is not one of {', '.join(SHELLS)}{hint}", file=sys.stderr)
    return USAGE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
