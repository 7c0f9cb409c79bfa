"""The configuration of `prepare`, which is also its flags."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from data_pipelines import flag_fields
from data_pipelines.errors import InputError
from data_pipelines.flag_fields import flag
from data_pipelines.prepare.beam import beam_faults
from data_pipelines.prepare.spark import SPARK, spark_faults
from data_pipelines.sources import Source, open_source
from data_pipelines.sources.combined import open_combined
from data_pipelines.tokenizers import TOKENIZERS
from data_pipelines.tokenizers.vocabulary import FIRST_ID, read_pieces

MOST_IDS = 20_000
LABELS = ("single", "multi")
# What decides the documents' ids, besides the data.
CONTENT = (
    *("source", "unlabelled", "labelled"),
    *("text_key", "label_key", "id_key", "context_key", "unlabelled_text_key", "labels"),
    *("tokenizer", "vocab_size", "min_count", "lowercase"),
)
_source, _tokens = functools.partial(flag, "Source"), functools.partial(flag, "Tokens")
_execution = functools.partial(flag, "Execution")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how. Each field is a flag of `prepare` and carries its help.

    Raises:
        InputError: A value is out of range, or two contradict each other.
    """

    # fmt: off
    source: str = _source("", "Source of the text; see docs/data-sources.md.")
    unlabelled: str = _source("", "Source of unlabelled text. Replaces --source, together with "
        "--labelled.")
    labelled: str = _source("", "Source of labelled documents. Replaces --source, together with "
        "--unlabelled.")
    data_dir: str | None = _source(None, "Folder of prepared TFDS data sets, for tfds: sources.")
    text_key: str = _source("", "Column or key of the text. Default: text.")
    label_key: str = _source("", "Column or key of the label. Default: label.")
    labels: str = _source("single", "Whether a document has one label, or a set of labels (multi): "
        "a list in JSON Lines and Parquet, and in CSV and TSV labels separated by |.",
        choices=LABELS)
    id_key: str = _source("", "Column or key of the id. Default: file name and position.")
    context_key: str = _source("", "Column or key of what a labelled document belongs to, such as "
        "its author, product or domain. The trainer's --context_key uses it.")
    unlabelled_text_key: str = _source("", "Column or key of the text of --unlabelled. "
        "Default: text.")
    tokenizer: str = _tokens("word", "Unit of text that becomes a token.", choices=TOKENIZERS)
    vocab_size: int | None = _tokens(None, "Vocabulary size, including the 3 reserved ids; for "
        "characters and bytes a maximum. Default: 20000, or fewer if the data has fewer.",
        at_least=4)
    min_count: int = _tokens(2, "Smallest count of a word in training text. Rarer words become "
        "unknown, and do not shape subwords.", at_least=1)
    vocab_file: str = _tokens("", "vocab.txt of an encoder bundle or another store, in place of a "
        "vocabulary from the data: to fine-tune that encoder on other text.")
    lowercase: bool | None = _tokens(None, "Lower-case the text. Default: true, except for "
        "bytes.")
    max_bad_examples: int = _source(0, "Number of unusable documents to leave out before prepare "
        "stops.",
        at_least=0)
    processes: int = _execution(1, "Number of processes that tokenize. 0: one per core. The result "
        "is the same.", at_least=0)
    runner: str = _execution("", "Cluster to run on: spark, or a runner of Apache Beam "
        "(DirectRunner, FlinkRunner, SparkRunner, DataflowRunner). Default: processes of this "
        "machine.")
    runner_options: str = _execution("", "Properties of Spark, e.g. "
        "'spark.master=spark://HOST:7077 spark.executor.memory=4g', or flags of Apache Beam.")
    # fmt: on

    def __post_init__(self) -> None:
        if faults := flag_fields.all_faults(self, PrepareConfig._faults):
            raise InputError("\n".join(faults))
        if self.lowercase is None:
            object.__setattr__(self, "lowercase", self.tokenizer != "byte")

    def _faults(self) -> list[str]:
        faults = []
        if bool(self.source) == bool(self.unlabelled or self.labelled) or (
            bool(self.unlabelled) != bool(self.labelled)
        ):
            faults.append("--source is required, or --unlabelled and --labelled instead of it")
        if self.unlabelled_text_key and not self.unlabelled:
            faults.append(f"--unlabelled_text_key={self.unlabelled_text_key} needs --unlabelled")
        if self.vocab_file:
            faults += self._vocab_file_faults()
        if self.runner == SPARK:
            faults += spark_faults(self.runner_options)
        else:
            faults += beam_faults(self.runner, self.runner_options)
        return faults + self._byte_faults()

    def _vocab_file_faults(self) -> list[str]:
        faults = []
        if self.vocab_size is not None:
            faults.append(f"--vocab_size={self.vocab_size} does not go with --vocab_file")
        try:
            read_pieces(self.vocab_file, self.tokenizer)
        except InputError as error:
            faults.append(f"--vocab_file={error}")
        return faults

    def _byte_faults(self) -> list[str]:
        if self.tokenizer != "byte":
            return []
        faults = []
        if self.most_ids < FIRST_ID + 256:
            faults.append(
                f"--vocab_size={self.vocab_size} is less than the {FIRST_ID + 256} ids of "
                "--tokenizer=byte"
            )
        if self.lowercase:
            faults.append("--lowercase is not for --tokenizer=byte, which keeps every byte")
        return faults

    @property
    def most_ids(self) -> int:
        """The maximum size of the vocabulary, including the reserved ids."""
        return MOST_IDS if self.vocab_size is None else self.vocab_size

    def content(self) -> dict[str, Any]:
        """Returns the manifest's `prepare_config`: what decides the documents' ids."""
        values = {name: getattr(self, name) for name in CONTENT}
        given = self.vocab_file and hashlib.sha256(Path(self.vocab_file).read_bytes()).hexdigest()
        return values | {"vocab_size": self.most_ids, "vocab_file": given}

    def tokenizer_config(self) -> dict[str, Any]:
        """Returns the config of the tokenizer."""
        if self.tokenizer == "byte":
            return {"type": "byte"}
        return {"type": self.tokenizer, "lowercase": self.lowercase}

    def open_source(self) -> Source:
        """Opens the source, or the two.

        Raises:
            InputError: a spec or a key is wrong, or data is missing.
        """
        names = ("text_key", "label_key", "id_key", "context_key", "labels")
        keys = {name: getattr(self, name) for name in names}
        if self.source:
            return open_source(self.source, self.data_dir, **keys)
        return open_combined(
            self.unlabelled, self.labelled, self.data_dir, self.unlabelled_text_key, **keys
        )
