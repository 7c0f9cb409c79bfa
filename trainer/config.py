"""The configuration: one frozen dataclass, one field a flag, all faults reported at once."""

import dataclasses
import difflib
import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from data_pipelines.errors import InputError
from data_pipelines.rows import kind_and_path
from trainer.distribution.cluster import Cluster, distributor_faults
from trainer.reporting import trackers

TRAINING_STAGES = ("all", "pretrain", "finetune", "evaluate", "replay")
# They need a classifier bundle and nothing else: no data, no run's folder, no other workers.
USING_STAGES = ("predict", "export", "serve")
STAGES = (*TRAINING_STAGES, *USING_STAGES)
DISTRIBUTORS = ("auto", "one_device", "mirrored", "multi_worker", "horovod")
OBJECTIVES = ("sequence_autoencoder", "language_model")
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
OPTIMIZERS = ("adam", "adamw", "nadam", "sgd")
INITIAL_STATES = ("zero", "mean", "learned", "encode")
STARTS = ("both", "warm", "scratch")
POOLINGS = ("last", "concat")
SCHEDULES = ("constant", "exponential", "cosine", "triangular")


def _flag(
    group: str,
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Returns a dataclass field that is also a flag; the bounds are those of its value."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"group": group, "help": help, "choices": choices, "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All that a run is told. Each field's help is its flag's."""

    # fmt: off
    stage: str = _flag("Run", "all", "What to do; all = pretrain, then fine-tune from the encoder "
                       "and from scratch, and compare.", choices=STAGES)
    starts: str = _flag("Run", "both", "Of --stage=all, which classifiers are trained and tested: "
                        "the warm start (warm), the one from scratch (scratch), which needs no "
                        "pretraining, or both.", choices=STARTS)
    run_dir: str = _flag("Run", "", "Folder that the run writes: checkpoints, metrics.jsonl, "
                         "bundles, report.json.")
    step: int = _flag("Run", 0, "With --stage=replay: the step of the run in --run_dir that is run "
                      "again, to look at it.", at_least=0)
    resume: str = _flag("Run", "auto", "auto = go on from the newest checkpoint in --run_dir; "
                        "never = start again.", choices=("auto", "never"))
    scale: str = _flag("Run", "full", "smoke = sizes and steps cut down so far that a run takes "
                       "seconds: to try a flagfile.", choices=("full", "smoke"))
    seed: int = _flag("Run", 0, "Of the weights, the data order, dropout and sampling.",
                      at_least=0, below=2**31)
    track: str = _flag("Run", "", "Where metrics go besides metrics.jsonl: tensorboard, mlflow, "
                       "wandb; several with commas.")
    log_every_steps: int = _flag("Run", 10, "Steps between status lines.", at_least=1)
    checkpoint_every_steps: int = _flag("Run", 200, "Steps between checkpoints.", at_least=1)
    keep_checkpoints: int = _flag("Run", 2, "How many of the newest checkpoints are kept.",
                                  at_least=1)
    keep_best: int = _flag("Run", 0, "How many checkpoints are kept besides, of those with the "
                           "lowest validation error or nats a token; every evaluation is then "
                           "followed by a checkpoint.", at_least=0)
    checkpoint_errors: str = _flag("Run", "stop", "What happens when a checkpoint cannot be "
                                   "written: the run stops, or warns and trains on without.",
                                   choices=("stop", "warn"))
    on_nonfinite: str = _flag("Run", "stop", "What happens at a step whose loss or gradient is not "
                              "finite: the run stops, or leaves the step out.",
                              choices=("stop", "skip"))
    max_skipped_steps: int = _flag("Run", 10, "How many steps of a stage --on_nonfinite=skip may "
                                   "leave out before it stops.", at_least=0)
    preemption_signal: str = _flag("Run", "TERM", "A signal that asks the run to save and stop, "
                                   "as TERM does.", choices=("TERM", "USR1", "USR2", "INT", "HUP"))
    grace_seconds: float = _flag("Run", 0.0, "A run that has not stopped so long after such a "
                                 "signal ends without a checkpoint; 0 = it takes its time.",
                                 at_least=0)
    stall_seconds: float = _flag("Run", 0.0, "After so long without a step or an evaluation, print "
                                 "every thread's stack and exit with 1; 0 = never. The first step "
                                 "takes longest.", at_least=0)
    status_port: int = _flag("Run", 0, "Port on which the first worker answers /healthz and "
                             "Prometheus's /metrics; 0 = none.", at_least=0, at_most=65535)
    status_host: str = _flag("Run", "127.0.0.1", "Address that --status_port listens on; 0.0.0.0 = "
                             "all of this machine's, for whoever can reach it.")

    steps_per_call: int = _flag("Run", 1, "Steps that run as one call, without waiting for each: "
                                "faster where a step takes milliseconds. The results are the "
                                "same; TERM is noticed between calls.", at_least=1)

    profile_steps: str = _flag("Run", "", "A:B profiles steps A to B of each stage, writes the "
                               "profile for TensorBoard to its folder and prints where a step's "
                               "time goes.")

    store: str = _flag("Data", "", "Token store; made from --source where there is none yet.")
    source: str = _flag("Data", "", "Where the text is from when --store must be made; see "
                        "docs/data-sources.md. Default: movie_reviews.")
    unlabelled: str = _flag("Data", "", "With --labelled, in place of --source: the text to "
                            "pretrain on.")
    labelled: str = _flag("Data", "", "With --unlabelled: the documents to fine-tune on.")
    data_dir: str = _flag("Data", "", "Folder of prepared TFDS data sets; default: $TFDS_DATA_DIR.")
    tokenizer: str = _flag("Data", "word", "What the text of a store that is made is split into.",
                           choices=("word", "character", "byte", "subword"))
    vocab_size: int = _flag("Data", 20_000, "Ids of a store that is made, three reserved ones "
                            "included; for characters and bytes, at most.", at_least=4)

    verify: bool = _flag("Data", False, "Whether to check every file of the store against its "
                         "checksum first.")

    embedding_dim: int = _flag("Model", 128, "Size of a word's embedding.", at_least=1)
    units: int = _flag("Model", 256, "LSTM cells.", at_least=1)
    precision: str = _flag("Model", "float32", "Keras's dtype policy of the LSTMs: in the mixed "
                           "ones their products are in half precision; weights, states inside "
                           "the layer and losses stay float32. mixed_bfloat16 holds for the "
                           "products of the sampled softmax too; mixed_float16 scales the loss; "
                           "auto = mixed_bfloat16 where it is measured to be faster.",
                           choices=PRECISIONS)
    recompute: bool = _flag("Model", False, "Whether training keeps no activations of the LSTMs, "
                            "and runs them again in the backward pass: less memory, more time.")
    num_layers: int = _flag("Model", 1, "LSTMs, each reading the outputs of the one below.",
                            at_least=1)
    memory_steps: int = _flag("Model", 100, "How many steps a new LSTM's cells start out "
                              "remembering, at the most.", at_least=1)
    hidden_units: int = _flag("Model", 30, "ReLU units between the LSTM and the logit.",
                              at_least=1)
    init_embeddings: str = _flag("Model", "", "File of word vectors, in word2vec's or GloVe's text "
                                 "format, that new embeddings start from; of words that it does "
                                 "not have they are random.")

    pretrain_objective: str = _flag("Pretraining", "sequence_autoencoder", "What is learned: to "
                                    "write a text again after reading it, or to predict each next "
                                    "word.", choices=OBJECTIVES)
    pretrain_direction: str = _flag("Pretraining", "forward", "Whether documents are read as they "
                                    "are or last word first: the second encoder of a "
                                    "bidirectional classifier.", choices=("forward", "backward"))
    pretrain_documents: int = _flag("Pretraining", 0, "Documents to pretrain on, chosen by the "
                                    "seed; 0 = all.", at_least=0)
    pretrain_steps: int = _flag("Pretraining", 2_000, "Steps.", at_least=1)
    pretrain_batch_size: int = _flag("Pretraining", 64, "Pieces in a global batch.",
                                     at_least=1)
    pretrain_max_tokens: int = _flag("Pretraining", 400, "Longer documents are cut into pieces "
                                     "of this many tokens.", at_least=2)
    pretrain_tokens_per_batch: int = _flag("Pretraining", 0, "Tokens in a global batch, in place "
                                           "of --pretrain_batch_size; 0 = off.", at_least=0)
    pretrain_packing: str = _flag("Pretraining", "none", "none = a row is a document or a piece of "
                                  "one; concat = documents are joined, end tokens between, and cut "
                                  "into rows of --pretrain_max_tokens; stream = the same, and rows "
                                  "go on from the state in which those of the step before ended "
                                  "(language model).", choices=("none", "concat", "stream"))
    pretrain_learning_rate: float = _flag("Pretraining", 1e-3, "Adam's.", above=0)
    pretrain_schedule: str = _flag("Pretraining", "exponential", "How the learning rate goes on: "
                                   "falls by --pretrain_learning_rate_decay; or rises, and falls "
                                   "along a cosine or a line.", choices=SCHEDULES)
    pretrain_learning_rate_decay: float = _flag("Pretraining", 0.9999, "Factor on the rate after "
                                                "each step, of the exponential schedule.",
                                                above=0, at_most=1)
    pretrain_warmup_fraction: float = _flag("Pretraining", 0.1, "Part of the steps in which the "
                                            "rate rises, of cosine and triangular.",
                                            at_least=0, below=1)
    pretrain_embedding_scale: float = _flag("Pretraining", 1.0, "Bounds of new embeddings, plus "
                                            "and minus.", above=0)
    pretrain_dropout: float = _flag("Pretraining", 0.0, "Of embeddings and outputs.",
                                    at_least=0, below=1)
    pretrain_word_dropout: float = _flag("Pretraining", 0.0, "Of the words that the LSTM is given "
                                         "while it predicts the next; 1 = it sees only the state.",
                                         at_least=0, at_most=1)
    pretrain_subsampling: float = _flag("Pretraining", 0.0, "Frequency above which words are left "
                                        "out of the loss at random, the more frequent the more "
                                        "often; 0 = off.", at_least=0, below=1)
    sampled_softmax: int = _flag("Pretraining", 1024, "Candidates of the training softmax; "
                                 "0 = exact.", at_least=0)
    tied_softmax: bool = _flag("Pretraining", False, "Whether the softmax's weights are the "
                               "embeddings.")
    pretrain_evaluate_every_steps: int = _flag("Pretraining", 1_000, "Steps between evaluations "
                                               "(exact softmax).", at_least=1)
    pretrain_evaluate_documents: int = _flag("Pretraining", 1_000, "Validation pieces that an "
                                             "evaluation reads.", at_least=1)

    reconstruct_documents: int = _flag("Pretraining", 0, "Validation pieces that a sequence "
                                       "autoencoder writes again at the end, word by word, and "
                                       "compares.", at_least=0)
    mean_state_documents: int = _flag("Pretraining", 10_000, "Pieces of the corpus over which the "
                                      "mean final state is taken.", at_least=1)

    encoder: str = _flag("Fine-tuning", "", "Encoder bundle to start from (a folder).")
    backward_encoder: str = _flag("Fine-tuning", "", "Encoder bundle, of "
                                  "--pretrain_direction=backward, of a second direction: the "
                                  "logits of both are averaged.")
    init_weights: str = _flag("Fine-tuning", "encoder", "Where the LSTM's and the embeddings' "
                              "weights come from.", choices=("encoder", "random"))
    initial_state: str = _flag("Fine-tuning", "learned", "What state the LSTM starts from; "
                               "all but zero come from the encoder.", choices=INITIAL_STATES)
    pooling: str = _flag("Fine-tuning", "last", "Of the LSTM's outputs, what the classifier's head "
                         "reads: the last; or the last, the mean and the maximum over time.",
                         choices=POOLINGS)
    label_gain: str = _flag("Fine-tuning", "last", "Where the label is predicted in training: at "
                            "the document's end; or after every word, with a weight that rises "
                            "linearly.", choices=("last", "linear"))
    finetune_documents: int = _flag("Fine-tuning", 0, "Labelled documents to train on, chosen by "
                                    "the seed; 0 = all of the train split.", at_least=0)
    finetune_steps: int = _flag("Fine-tuning", 1_000, "Steps.", at_least=1)
    finetune_batch_size: int = _flag("Fine-tuning", 64, "Documents in a global batch.",
                                     at_least=1)
    finetune_max_tokens: int = _flag("Fine-tuning", 400, "A document's last tokens that are "
                                     "read.", at_least=2)
    finetune_learning_rate: float = _flag("Fine-tuning", 1e-3, "Adam's.", above=0)
    finetune_schedule: str = _flag("Fine-tuning", "exponential", "How the learning rate goes on: "
                                   "falls by --finetune_learning_rate_decay; or rises, and falls "
                                   "along a cosine or a line.", choices=SCHEDULES)
    finetune_learning_rate_decay: float = _flag("Fine-tuning", 0.9998, "Factor on the rate after "
                                                "each step, of the exponential schedule.",
                                                above=0, at_most=1)
    finetune_warmup_fraction: float = _flag("Fine-tuning", 0.1, "Part of the steps in which the "
                                            "rate rises, of cosine and triangular.",
                                            at_least=0, below=1)
    finetune_ema: float = _flag("Fine-tuning", 0.0, "Decay of the moving average of the weights, "
                                "which is then what is evaluated and kept; 0 = off.",
                                at_least=0, below=1)
    label_smoothing: float = _flag("Fine-tuning", 0.0, "Part of a label that is spread evenly over "
                                   "all classes in training.", at_least=0, below=1)
    encoder_rate: float = _flag("Fine-tuning", 1.0, "Factor on the learning rate of the weights "
                                "that come from the encoder; a learned state has the head's.",
                                above=0)
    encoder_frozen_steps: int = _flag("Fine-tuning", 0, "First steps in which the weights that "
                                      "come from the encoder are not trained; a learned state is.",
                                      at_least=0)
    layer_rate: float = _flag("Fine-tuning", 1.0, "Factor on the learning rate from one layer to "
                              "the next below, head first, for what comes from the encoder.",
                              above=0, at_most=1)
    unfreeze_every_steps: int = _flag("Fine-tuning", 0, "Steps after which one more layer of those "
                                      "that come from the encoder is trained, from the top down; "
                                      "0 = all at once.", at_least=0)
    finetune_dropout: float = _flag("Fine-tuning", 0.3, "Of embeddings and of what the head reads.",
                                    at_least=0, below=1)
    finetune_evaluate_every_steps: int = _flag("Fine-tuning", 250, "Steps between evaluations; "
                                               "the best weights are kept.", at_least=1)
    joint_weight: float = _flag("Fine-tuning", 0.0, "Weight of the loss of --pretrain_objective on "
                                "the labelled documents, in nats a token, which the encoder is "
                                "trained for as well; 0 = off.", at_least=0)
    adversarial_weight: float = _flag("Fine-tuning", 0.0, "Weight of the loss at embeddings that "
                                      "are moved to where the label's loss grows fastest; "
                                      "0 = off.", at_least=0)
    virtual_adversarial_weight: float = _flag("Fine-tuning", 0.0, "Weight of the divergence from "
                                              "the prediction at embeddings that are moved to "
                                              "where it changes most; 0 = off.", at_least=0)
    perturbation_norm: float = _flag("Fine-tuning", 5.0, "How far a document's normalised "
                                     "embeddings are moved, all its words together.", above=0)
    unlabelled_batch_size: int = _flag("Fine-tuning", 0, "Documents of the unsupervised split in "
                                       "each step, for the virtual adversarial loss; 0 = only the "
                                       "labelled ones.", at_least=0)
    optimizer: str = _flag("Optimization", "adam", "Of keras.optimizers; sgd has momentum 0.9.",
                           choices=OPTIMIZERS)
    recurrent_weight_dropout: float = _flag("Optimization", 0.0, "Of the LSTMs' recurrent weights, "
                                            "the same ones for a whole step, in both stages.",
                                            at_least=0, below=1)
    clip_norm: float = _flag("Optimization", 1.0, "Largest global norm of a step's gradients.",
                             above=0)
    accumulate_steps: int = _flag("Optimization", 1, "Parts in which a worker works through its "
                                  "share of a global batch, one after the other: less memory, the "
                                  "same result.", at_least=1)

    classifier: str = _flag("Evaluation", "", "Classifier bundle to evaluate or use (a folder).")
    evaluate_split: str = _flag("Evaluation", "test", "Split of the store to evaluate on.",
                                choices=("train", "validation", "test"))

    input: str = _flag("Prediction", "", "What to predict, if no texts are on the command line: "
                       "[KIND:]FILES, KIND text, csv, tsv or jsonl, or by the ending; - (and the "
                       "default) is standard input.")
    output: str = _flag("Prediction", "", "Where predictions go, written as --input is; default: "
                        "standard output. Of --stage=export: the folder of the exported model.")
    text_key: str = _flag("Prediction", "", "Column or key of the text in --input; empty = text.")
    explain: bool = _flag("Prediction", False, "Whether to show what each word adds to the answer, "
                          "by leaving it out: a text is read as often as it has words.")

    reconstruct: bool = _flag("Prediction", False, "Whether to show how the autoencoder of "
                              "--encoder writes each text again, in place of predicting.")

    host: str = _flag("Serving", "127.0.0.1", "Address to serve on; 0.0.0.0 = every one.")
    port: int = _flag("Serving", 8000, "Port; 0 = one that is free.", at_least=0, below=2**16)
    max_body_bytes: int = _flag("Serving", 1 << 20, "Larger requests are refused.", at_least=1)
    max_texts: int = _flag("Serving", 256, "Requests of more texts are refused.", at_least=1)

    distributor: str = _flag("Distribution", "auto", "How workers run the step; auto = "
                             "horovod where HOROVOD_SIZE or OMPI_COMM_WORLD_SIZE name peers, "
                             "multi_worker where TF_CONFIG, WARMSTATE_HOSTS, a TrainJob's "
                             "PET_NNODES or SLURM's srun do, else one_device.",
                             choices=DISTRIBUTORS)
    sparse_reduce: str = _flag("Distribution", "auto", "How the gradient of an embedding table is "
                               "summed over workers: all of it, or the rows that are not zero; "
                               "auto = the fewer bytes.", choices=("auto", "dense", "rows"))
    compress: str = _flag("Distribution", "none", "Type in which other gradients are sent and "
                          "added.", choices=("none", "fp16", "bf16"))
    check_divergence: bool = _flag("Distribution", False, "Whether every checkpoint compares all "
                                   "workers' weights, and stops the run if they differ.")
    collective_timeout_seconds: float = _flag("Distribution", 60.0, "How long a collective waits "
                                              "for a worker that hangs.", above=0)
    # fmt: on

    @property
    def needs_encoder(self) -> bool:
        """Whether fine-tuning reads an encoder bundle."""
        return self.init_weights == "encoder" or self.initial_state != "zero"

    @property
    def uses_softmax(self) -> bool:
        """Whether words are predicted: in pretraining, and in joint training."""
        return self.stage in ("all", "pretrain") or self.joint_weight > 0

    @property
    def normalises_embeddings(self) -> bool:
        """Whether fine-tuning reads normalised embeddings: where it moves them."""
        return self.adversarial_weight > 0 or self.virtual_adversarial_weight > 0


# The most that --scale=smoke leaves of each.
SMOKE_LIMITS = {
    "vocab_size": 1_000, "embedding_dim": 8, "units": 12, "hidden_units": 8, "sampled_softmax": 64,
    "pretrain_documents": 100, "pretrain_steps": 4, "pretrain_batch_size": 8,
    "pretrain_max_tokens": 24, "pretrain_tokens_per_batch": 192, "pretrain_evaluate_documents": 16,
    "reconstruct_documents": 16, "mean_state_documents": 16, "finetune_documents": 50,
    "finetune_steps": 4, "finetune_batch_size": 8, "finetune_max_tokens": 24,
    "finetune_evaluate_every_steps": 4, "unlabelled_batch_size": 8, "encoder_frozen_steps": 2,
}  # fmt: skip

# What may differ between two sittings of the same run.
FREE_ON_RESUME = {
    "steps_per_call", "profile_steps",
    "stage", "run_dir", "resume", "log_every_steps", "checkpoint_every_steps", "store", "data_dir",
    "encoder", "backward_encoder", "classifier", "evaluate_split", "distributor",
    "collective_timeout_seconds",
    "check_divergence", "verify", "keep_checkpoints", "checkpoint_errors", "on_nonfinite",
    "max_skipped_steps", "stall_seconds", "preemption_signal", "grace_seconds",
    "keep_best", "status_port", "status_host", "track",
    *(
        item.name
        for item in dataclasses.fields(Config)
        if item.metadata["group"] in ("Prediction", "Serving")
    ),
}  # fmt: skip


KINDS: dict[type, str] = {int: "an integer", float: "a number", str: "", bool: "true or false"}


def kind_of(item: dataclasses.Field[Any]) -> type:
    """Returns the type of a field of Config."""
    assert isinstance(item.type, type)  # no field's type is written as text
    return item.type


def _boolean(argument: Any) -> bool:
    return {"true": True, "false": False}[str(argument).lower()]


@dataclass(frozen=True)
class _Unusable:
    """A flag's value that could not be parsed."""

    raw: str


class _Parser(flags.ArgumentParser[Any]):
    """Parses a flag's value, and keeps what it cannot parse for `faults_of` to report."""

    def __init__(self, kind: type):
        self.kind = kind
        self.syntactic_help = KINDS[kind]

    def parse(self, argument: Any) -> Any:
        try:
            return _boolean(argument) if self.kind is bool else self.kind(argument)
        except (KeyError, ValueError):
            return _Unusable(str(argument))

    def flag_type(self) -> str:
        return self.kind.__name__


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one absl flag for each field of Config."""
    for item in dataclasses.fields(Config):
        flags.DEFINE(
            _Parser(kind_of(item)),
            item.name,
            item.default,
            item.metadata["help"],
            flag_values=flag_values,
            serializer=flags.ArgumentSerializer(),
            boolean=item.type is bool,
        )


def help_text() -> str:
    """Returns the flags with their defaults, by group."""
    lines, group = [], ""
    for item in dataclasses.fields(Config):
        if item.metadata["group"] != group:
            group = item.metadata["group"]
            lines += ["", f"{group}:"]
        choices = "|".join(item.metadata["choices"]) or kind_of(item).__name__
        lines.append(f"  --{item.name}={choices}  (default: {item.default!r})")
        lines.append(f"      {item.metadata['help']}")
    return "\n".join(lines).lstrip("\n")


def parse(
    argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> tuple[list[str], list[str]]:
    """Parses the command line into `flag_values`.

    Returns:
      Faults: unknown flags, with the nearest known ones, and words that are no flags where none
        belong.
      The words, which are texts in --stage=predict; all that stand behind `--` are.
    """
    flag_values.set_gnu_getopt()  # flags may stand behind a text
    try:
        rest = flag_values(list(argv), known_only=True)[1:]
    except (flags.Error, UnicodeDecodeError, OSError) as error:
        flag_values.mark_as_parsed()
        why = "--flagfile: no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        return [why], []
    end = rest.index("--") if "--" in rest else len(rest)
    unknown = [word for word in rest[:end] if word.startswith("-")]
    words = [word for word in rest[:end] if not word.startswith("-")] + rest[end + 1 :]
    faults = []
    for word in unknown:
        name = word.lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, list(flag_values), n=2)
        hint = f"; did you mean {' or '.join('--' + n for n in near)}?" if near else ""
        faults.append(f"--{name} is not a flag of this program{hint}")
    if flag_values["stage"].value != "predict":
        faults += [f"{word!r} is not a flag; flags are written --name=value" for word in words]
    return faults, words


def from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the configuration that the parsed flags hold."""
    values = {i.name: getattr(flag_values, i.name) for i in dataclasses.fields(Config)}
    if values["scale"] == "smoke":
        for name, limit in SMOKE_LIMITS.items():
            if isinstance(values[name], int):  # else it is a fault, to be reported
                values[name] = min(values[name], limit)
    return Config(**values)


def faults_of(config: Config, cluster: Cluster) -> list[str]:
    """Returns every fault of the configuration that needs no data to be seen, one line each."""
    faults = [fault for item in dataclasses.fields(config) for fault in _value_faults(config, item)]
    faults += _address_faults(config)
    faults += _run_dir_faults(config)
    if any(isinstance(value, _Unusable) for value in vars(config).values()):
        return faults  # what compares two values needs both
    if config.stage in USING_STAGES:
        return faults + _using_faults(config, cluster)
    faults += trackers.faults_of(config.track)
    faults += distributor_faults(config.distributor, cluster)
    faults += _batch_size_faults(config, cluster)
    faults += _pretraining_faults(config)
    faults += _step_faults(config)
    faults += _source_faults(config)
    faults += _finetuning_faults(config)
    return faults + _stage_faults(config)


def step_range(text: str) -> tuple[int, int] | None:
    """Returns the steps A and B that "A:B" names, None if it does not name any."""
    match = re.fullmatch(r"([1-9]\d{0,11}):([1-9]\d{0,11})", text)
    found = (int(match[1]), int(match[2])) if match else None
    return found if found and found[0] <= found[1] else None


def _value_faults(config: Config, item: dataclasses.Field[Any]) -> list[str]:
    value, choices = getattr(config, item.name), item.metadata["choices"]
    if isinstance(value, _Unusable):
        return [f"--{item.name}={value.raw} is not {KINDS[kind_of(item)]}"]
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [f"--{item.name}={value} is not one of {', '.join(choices)}{hint}"]
    bounds = item.metadata["bounds"]
    wrong = {
        "at_least": lambda bound: not value >= bound,
        "above": lambda bound: not value > bound,
        "at_most": lambda bound: not value <= bound,
        "below": lambda bound: not value < bound,
    }
    return [
        f"--{item.name}={value} must be {name.replace('_', ' ')} {bound}"
        for name, bound in bounds.items()
        if bound is not None and wrong[name](bound)
    ]


def _address_faults(config: Config) -> list[str]:
    """Returns a fault for each folder that is an address; docs/decisions.md says why."""
    return [
        f"--{name}={getattr(config, name)} is an address: it must be a folder of a file system, on "
        "which files are flushed and renamed; train in a local one or a volume, and copy bundles "
        "and checkpoints with the store's own tool"
        for name in ("run_dir", "store", "encoder", "backward_encoder", "classifier")
        if "://" in getattr(config, name)
    ]


def _folder_faults(flag: str, folder: str) -> list[str]:
    """Returns a fault if `folder` cannot be written or made."""
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        return [f"{flag}={folder} is a file; name a folder"]
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return []
    except OSError as error:
        return [f"{flag}={folder} cannot be written: {existing}: {error.strerror}"]


def _run_dir_faults(config: Config) -> list[str]:
    """Returns a fault if the stage writes a run's folder and cannot; see `_address_faults`."""
    if config.stage in USING_STAGES or "://" in config.run_dir:
        return []
    if not config.run_dir:
        return ["--run_dir is not set: name the folder that the run may write"]
    return [] if config.stage == "replay" else _folder_faults("--run_dir", config.run_dir)


def _batch_size_faults(config: Config, cluster: Cluster) -> list[str]:
    """Returns what is wrong with global batches for so many workers."""
    faults = []
    for stage in ("pretrain", "finetune"):
        name = f"{stage}_batch_size"
        if config.stage in ("all", stage) and getattr(config, name) < cluster.size:
            faults.append(
                f"--{name}={getattr(config, name)} is smaller than the number of workers, "
                f"{cluster.size}: some would have nothing to do"
            )
    return faults


def _pretraining_faults(config: Config) -> list[str]:
    """Returns which flags of pretraining do not go together."""
    faults = []
    if config.uses_softmax and config.sampled_softmax >= config.vocab_size:
        faults.append(
            f"--sampled_softmax={config.sampled_softmax} must be below --vocab_size="
            f"{config.vocab_size}; 0 is the exact softmax"
        )
    tokens = config.pretrain_tokens_per_batch
    if tokens and tokens < config.pretrain_max_tokens:
        faults.append(
            f"--pretrain_tokens_per_batch={tokens} must be at least --pretrain_max_tokens="
            f"{config.pretrain_max_tokens}, the longest row; 0 counts rows instead"
        )
    packing = config.pretrain_packing
    if tokens and packing != "none":
        faults.append(
            f"--pretrain_tokens_per_batch={tokens} with --pretrain_packing={packing}: its rows "
            "have one length; set --pretrain_batch_size instead"
        )
    if config.reconstruct_documents and config.pretrain_objective != "sequence_autoencoder":
        faults.append(
            f"--reconstruct_documents={config.reconstruct_documents} with --pretrain_objective="
            f"{config.pretrain_objective}: only a sequence_autoencoder writes texts again"
        )
    if packing == "stream" and config.pretrain_objective != "language_model":
        faults.append(
            f"--pretrain_packing=stream with --pretrain_objective={config.pretrain_objective}: "
            "only a language model carries its state from row to row; use concat or none"
        )
    return faults


def _step_faults(config: Config) -> list[str]:
    """Returns which flags of how steps are taken do not go together."""
    faults = []
    if config.profile_steps and step_range(config.profile_steps) is None:
        faults.append(
            f"--profile_steps={config.profile_steps} must be A:B, two step numbers from 1, A at "
            "most B, as in --profile_steps=20:30"
        )
    if config.steps_per_call > 1 and config.on_nonfinite == "skip":
        faults.append(
            f"--steps_per_call={config.steps_per_call} with --on_nonfinite=skip: whether a step is "
            "left out is decided after each; set --steps_per_call=1 or --on_nonfinite=stop"
        )
    if config.steps_per_call > 1 and config.precision == "mixed_float16":
        faults.append(
            f"--steps_per_call={config.steps_per_call} with --precision=mixed_float16: a step that "
            "overflows is tried again; set --steps_per_call=1 or --precision=mixed_bfloat16"
        )
    if config.steps_per_call > 1 and config.finetune_ema:
        faults.append(
            f"--steps_per_call={config.steps_per_call} with --finetune_ema={config.finetune_ema}: "
            "the weights are averaged after each step; set one of them back"
        )
    return faults


def _source_faults(config: Config) -> list[str]:
    """Returns a fault if it is not clear which texts are read."""
    faults = []
    pair = (config.unlabelled, config.labelled)
    if any(pair) and (config.source or not all(pair)):
        faults.append(
            f"--source={config.source} --unlabelled={pair[0]} --labelled={pair[1]}: give either "
            "--source, or both --unlabelled and --labelled"
        )
    return faults


def _finetuning_faults(config: Config) -> list[str]:
    """Returns which flags of fine-tuning do not go together."""
    faults = []
    for name in ("encoder_frozen_steps", "unfreeze_every_steps"):
        if config.optimizer == "adamw" and getattr(config, name):
            faults.append(
                f"--{name}={getattr(config, name)} with --optimizer=adamw: its weight decay would "
                "move the frozen weights; use --optimizer=adam"
            )
    if config.label_gain == "linear" and config.pooling != "last":
        faults.append(
            f"--label_gain=linear with --pooling={config.pooling}: a label after every word is "
            "predicted from that word's output; use --pooling=last"
        )
    vectors = config.init_embeddings
    if vectors and "://" not in vectors and not Path(vectors).is_file():
        faults.append(f"--init_embeddings={vectors} is not a file")
    if vectors and config.stage == "finetune" and config.init_weights == "encoder":
        faults.append(
            f"--init_embeddings={vectors} with --init_weights=encoder: the encoder has embeddings; "
            "set --init_weights=random, or leave one out"
        )
    if config.unlabelled_batch_size and not config.virtual_adversarial_weight:
        faults.append(
            f"--unlabelled_batch_size={config.unlabelled_batch_size} needs "
            "--virtual_adversarial_weight: no other loss reads documents without labels"
        )
    return faults


def _stage_faults(config: Config) -> list[str]:
    faults = []
    if config.stage == "finetune" and not config.encoder and config.needs_encoder:
        why = (
            "--init_weights=encoder"
            if config.init_weights == "encoder"
            else f"--initial_state={config.initial_state}"
        )
        faults.append(
            f"{why} needs an encoder: set --encoder to a bundle that --stage=pretrain wrote, or "
            "train from scratch with --init_weights=random --initial_state=zero"
        )
    for name in ("encoder", "backward_encoder"):
        if config.stage == "all" and getattr(config, name):
            faults.append(f"--stage=all trains an encoder of its own: leave --{name} out")
    if config.stage == "all" and config.pretrain_direction == "backward":
        faults.append(
            "--pretrain_direction=backward with --stage=all, whose classifier reads forward: "
            "pretrain with --stage=pretrain, and give the encoder to fine-tuning as "
            "--backward_encoder"
        )
    if config.stage == "finetune" and config.backward_encoder and not config.needs_encoder:
        faults.append(
            f"--backward_encoder={config.backward_encoder} is not read with --init_weights=random "
            "--initial_state=zero: leave it out, or take weights or a state from encoders"
        )
    if config.stage == "evaluate" and not config.classifier:
        faults.append("--stage=evaluate needs --classifier: a bundle that --stage=finetune wrote")
    if (config.stage == "replay") != (config.step > 0):
        faults.append(
            f"--step={config.step} with --stage={config.stage}: replay needs a step, counted from "
            "1, and nothing else takes one"
        )
    return faults


def _using_faults(config: Config, cluster: Cluster) -> list[str]:
    """Returns what is wrong with a stage that uses a trained model."""
    stage, faults = config.stage, []
    if cluster.size > 1:
        faults.append(f"--stage={stage} is for one process; the environment names {cluster.size}")
    if config.reconstruct and not (config.encoder and stage == "predict"):
        faults.append("--reconstruct needs --stage=predict and --encoder, an encoder bundle")
    if config.reconstruct and config.explain:
        faults.append("--reconstruct and --explain: choose one")
    if not config.classifier and not config.reconstruct:
        faults.append(f"--stage={stage} needs --classifier: a bundle that --stage=finetune wrote")
    if stage == "export" and not config.output:
        faults.append("--stage=export needs --output: the folder that the model is written to")
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if stage == "serve" and missing:
        faults.append(
            f"--stage=serve needs {' and '.join(missing)}: pip install -c constraints.txt "
            "-e '.[serve]' in a clone of warmstate"
        )
    if (config.explain or config.reconstruct) and kind_and_path(config.output)[0] in ("csv", "tsv"):
        flag = "explain" if config.explain else "reconstruct"
        faults.append(f"--{flag} with --output={config.output}: choose text or jsonl")
    if stage == "predict" and config.output.endswith((".gz", ".zst")):
        faults.append(f"--output={config.output}: what is written is not compressed; name it so")
    return faults


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Returns one line for each flag in which a resumed run differs from `saved`."""
    return [
        f"--{name} was {saved[name]!r} and is now {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_ON_RESUME and name in saved and saved[name] != value
    ]


def raise_if(faults: Sequence[str]) -> None:
    """Raises InputError with all the faults, if there are any."""
    if faults:
        raise InputError("\n".join(faults))
