"""Shell completion, generated from the flags: `warmstate completion bash|zsh|fish`.

The script that is printed holds all words, so that nothing is started while somebody types.
"""

import difflib
import functools
import shlex
import sys
from collections.abc import Callable

from warmstate.command import COMMANDS, flags_of
from warmstate.flag_tables import FLAGFILE, FlagRow


def bash() -> str:
    """Returns the completion of bash; values of flags complete behind `=` too."""
    cases = "\n".join(
        f"    {name}) flags={shlex.quote(' '.join(f'--{f.name}=' for f in _flags(name)))} ;;"
        for name in COMMANDS
        if _flags(name)
    )
    choices = {f.name: f.choices for name in COMMANDS for f in _flags(name) if f.choices}
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


def _zsh_flag(flag: FlagRow) -> str:
    escaped = "".join(f"\\{c}" if c in "[]:\\" else c for c in _first_sentence(flag.help))
    values = f"({' '.join(flag.choices)})" if flag.choices else "_files"
    return shlex.quote(f"--{flag.name}=[{escaped}]:{flag.kind}:{values}")


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
        for flag in _flags(name):
            values = f" -x -a {_fish_quoted(' '.join(flag.choices))}" if flag.choices else " -r"
            lines.append(
                f"complete -c warmstate -n '__fish_seen_subcommand_from {name}' -l {flag.name}"
                f"{values} -d {_fish_quoted(_first_sentence(flag.help))}"
            )
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].split("; ")[0].rstrip(".")


@functools.cache
def _flags(name: str) -> list[FlagRow]:
    found = flags_of(name)
    extra = FlagRow("", FLAGFILE, "str", "", "A file of flags, one a line")
    return [*found, extra] if found else []


SHELLS: dict[str, Callable[[], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def main(arguments: list[str]) -> int:
    """Prints the completion of the shell that is named; returns the exit code."""
    if len(arguments) == 1 and arguments[0] in SHELLS:
        print(SHELLS[arguments[0]](), end="")
        return 0
    given = " ".join(arguments)
    near = difflib.get_close_matches(given, SHELLS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"error: {given!r} is not one of {', '.join(SHELLS)}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
