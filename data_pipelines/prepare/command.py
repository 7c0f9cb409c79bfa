"""The command `python -m data_pipelines.prepare`: its flags, its messages and its exit codes."""

import sys
from dataclasses import dataclass

from absl import logging

from data_pipelines import flag_fields
from data_pipelines.errors import USAGE_EXIT_CODE, InputError
from data_pipelines.flag_fields import flag
from data_pipelines.prepare.build import ensure_store
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.prepare.runners import WorkerDiedError
from data_pipelines.printable import printable

TITLE = """\
Tokenizes text into a store on disk, from which the trainer reads.

  python -m data_pipelines.prepare --source=movie_reviews --out=runs/store"""


@dataclass(frozen=True)
class Options(PrepareConfig):
    """The flags of the command."""

    processes: int = flag(
        "Execution",
        0,
        "Number of processes that tokenize. 0: one per core. The result is the same.",
        at_least=0,
    )
    out: str = flag("Output", "", "Folder to write the token store to.")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; prints the help, or all faults, and exits, if there is cause to."""
    if flag_fields.HELP_WORDS & set(arguments[1:]):
        print(flag_fields.program_help(TITLE, [Options]))
        sys.exit(0)
    faults, words = flag_fields.parse(arguments)
    faults += [f"{word!r} is not a flag" for word in words]
    try:
        if not flag_fields.from_flags(Options).out:
            faults.append("--out is required")
    except InputError as error:
        faults.append(str(error))
    if faults:
        print(printable("\n".join(faults)), file=sys.stderr)
        sys.exit(USAGE_EXIT_CODE)
    return arguments[:1]


def main(_: list[str]) -> int:
    """Prepares the store that the flags describe; returns the exit code."""
    logging.set_verbosity(logging.WARNING)  # TFDS logs every split that it reads
    options = flag_fields.from_flags(Options)
    try:
        # Flushed, so that a log file or a pod's log shows progress at once.
        ensure_store(options, options.out, lambda line: print(printable(line), flush=True))
    except InputError as error:
        print(printable(error), file=sys.stderr)
        return USAGE_EXIT_CODE
    except WorkerDiedError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename or options.out}: {error.strerror or error}"
        print(
            printable(f"{where}: make room, or make it readable and writable, and run the same "
                      "command again: it continues"),
            file=sys.stderr,
        )  # fmt: skip
        return USAGE_EXIT_CODE
    return 0
