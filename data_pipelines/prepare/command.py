"""The command `python -m data_pipelines.prepare`: its flags, its messages and its exit codes."""

import dataclasses
import functools
import sys
from typing import Any

from absl import flags, logging

from data_pipelines.errors import InputError
from data_pipelines.prepare.build import PrepareConfig, ensure_store
from data_pipelines.prepare.runners import WorkerDiedError
from data_pipelines.tokenizers import TOKENIZERS


def define_flags() -> None:
    # In a function, because a program that imports this module has flags of the same names.
    flags.DEFINE_string("out", None, "The folder to write the token store to.")
    flags.DEFINE_string("source", "", "Where the text comes from: see docs/data-sources.md.")
    flags.DEFINE_string("unlabelled", "", "Instead of --source: where unlabelled text comes from.")
    flags.DEFINE_string("labelled", "", "With --unlabelled: where labelled documents come from.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets, for tfds: sources.")
    flags.DEFINE_string("text_key", "", "Column or key of the text; empty means text.")
    flags.DEFINE_string("label_key", "", "Column or key of the label; empty means label.")
    flags.DEFINE_string("id_key", "", "Column or key of the id; empty: file name and position.")
    flags.DEFINE_string("unlabelled_text_key", "", "--text_key of --unlabelled.")
    flags.DEFINE_string("tokenizer", "word", f"What text is split into: {', '.join(TOKENIZERS)}.")
    flags.DEFINE_integer(
        "vocab_size",
        20_000,
        "Ids in all, the 3 reserved ones included; for characters and bytes, at most.",
    )
    flags.DEFINE_integer("min_count", 2, "Rarer words become unknown, or shape no subwords.")
    flags.DEFINE_boolean("lowercase", None, "Whether to lower-case text; default: if not bytes.")
    flags.DEFINE_integer(
        "max_bad_examples", 0, "How many documents that cannot be used are left out; more: stop."
    )
    flags.DEFINE_integer("processes", 0, "Processes that tokenize; 0 means one a core.")
    flags.DEFINE_string(
        "runner", "", "DirectRunner, FlinkRunner, SparkRunner or DataflowRunner of Apache Beam."
    )
    flags.DEFINE_string("beam_options", "", "Beam's own flags, e.g. '--flink_master=HOST:8081'.")


def _config_from_flags() -> PrepareConfig:
    values = flags.FLAGS
    faults = [] if values.out else ["--out is required"]
    names = [field.name for field in dataclasses.fields(PrepareConfig)]
    given: dict[str, Any] = {name: values[name].value for name in names}
    try:
        config = PrepareConfig(**given)
    except InputError as error:
        faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    return config


def main(arguments: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # TFDS tells of every split that it reads
    try:
        if len(arguments) > 1:
            raise InputError(f"{arguments[1]!r} is not a flag")
        # Flushed, so that a log file or a pod's log shows progress as it is made.
        ensure_store(_config_from_flags(), flags.FLAGS.out, functools.partial(print, flush=True))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except WorkerDiedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        print(error, file=sys.stderr)
        sys.exit(2)
