"""warmstate in Python: the stages as functions of this process, and their bundles as objects.

    import warmstate

    store = warmstate.prepare("runs/store", source="csv:reviews.csv")
    encoder = warmstate.pretrain("runs/a", store, pretrain_steps=500)
    classifier = warmstate.finetune("runs/b", store, encoder.folder, finetune_steps=200)
    warmstate.predict(classifier.folder, ["A fine film."])

Settings are the flags of the command line, by name. Wrong input raises `InputError`, with all
faults in one message; nothing exits the process. Call the stages from the main thread of a process
that is not part of a larger job; `warmstate launch` starts several workers.

`warmstate.states` makes, reads and applies learned states of any Keras model.
`warmstate.TaskBank` reads texts of many tasks in one batch, all on one frozen encoder.

Importing this package imports no TensorFlow; the first call does. If Keras is imported already, it
lets `keras.models.load_model` read what `export --output=FILE.keras` wrote.
"""

import contextlib
import dataclasses
import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipelines.errors import InputError, raise_if
from data_pipelines.flag_fields import did_you_mean

if TYPE_CHECKING:
    from data_pipelines.store.token_store import TokenStore
    from trainer import states as states
    from trainer.config import Config
    from trainer.inference.task_bank import TaskBank as TaskBank
    from trainer.inference.text_classifier import Prediction, TextClassifier
    from trainer.inference.text_encoder import TextEncoder

__all__ = [
    *("InputError", "Trained"),
    *("prepare", "pretrain", "finetune", "evaluate"),
    *("load_encoder", "load_classifier", "predict", "states", "TaskBank"),
]

if "keras" in sys.modules:
    importlib.import_module("trainer.inference.keras_model")  # registers its class

Setting = int | float | bool | str
Log = Callable[[str], None]


class Trained(NamedTuple):
    """The result of a training stage.

    Attributes:
        folder: The bundle, for `finetune` or `load_encoder`, `load_classifier` and `predict`.
        report: The stage's part of report.json.
    """

    folder: Path
    report: dict[str, Any]


def prepare(folder: str | Path, *, log: Log = print, **settings: Setting | None) -> "TokenStore":
    """Makes a token store, or opens the one in `folder`.

    Args:
        folder: The store's.
        log: Receives lines of progress.
        **settings: Fields of `data_pipelines.prepare.PrepareConfig`: either `source`, or
            `unlabelled` and `labelled`, and others.

    Raises:
        InputError: A setting or the data is wrong.

    Example:
        store = warmstate.prepare("runs/store", source="csv:reviews.csv", vocab_size=5_000)
    """
    _import_quietly()
    from data_pipelines.prepare import PrepareConfig, ensure_store

    _check_names(settings, [field.name for field in dataclasses.fields(PrepareConfig)])
    return ensure_store(PrepareConfig(**settings), folder, log)  # type: ignore[arg-type]


def pretrain(
    run_dir: str | Path, store: "TokenStore | str | Path", *, log: Log = print, **settings: Setting
) -> Trained:
    """Trains an encoder on a store's text, or resumes the run in `run_dir`.

    Args:
        run_dir: Folder that the run writes.
        store: From `prepare`, or its folder.
        log: Receives lines of progress.
        **settings: The trainer's flags.

    Returns:
        The encoder's bundle, and steps, seconds, tokens_per_second, perplexity.

    Raises:
        InputError: A setting or the store is wrong.

    Example:
        encoder = warmstate.pretrain("runs/a", store, pretrain_steps=500, units=128)
    """
    report = _run("pretrain", run_dir, store, log, settings)
    return Trained(Path(run_dir) / "encoder", report["pretrain"])


def finetune(
    run_dir: str | Path,
    store: "TokenStore | str | Path",
    encoder: str | Path | None = None,
    *,
    log: Log = print,
    **settings: Setting,
) -> Trained:
    """Trains a classifier on a store's labelled text, or resumes the run in `run_dir`.

    Args:
        run_dir, store, log, settings: As for `pretrain`.
        encoder: Bundle that weights, states and sizes of the model come from; None trains from
            scratch.

    Returns:
        The classifier's bundle, and steps, seconds, validation metrics, and digests by worker.

    Raises:
        InputError: A setting, the store or the encoder is wrong.

    Example:
        classifier = warmstate.finetune("runs/b", store, encoder.folder, initial_state="mean")
    """
    if encoder is None:
        usual: dict[str, Setting] = {"init_weights": "random", "initial_state": "zero"}
    else:
        usual = _sizes(Path(encoder)) | {"encoder": str(encoder)}
    report = _run("finetune", run_dir, store, log, usual | settings)
    return Trained(Path(run_dir) / "classifier", report["finetune"])


def evaluate(
    run_dir: str | Path,
    store: "TokenStore | str | Path",
    classifier: str | Path,
    split: str = "test",
    *,
    log: Log = print,
    **settings: Setting,
) -> dict[str, Any]:
    """Returns error_percent, loss (nats) and documents of a classifier on a labelled split.

    Args:
        run_dir, store, log, settings: As for `pretrain`.
        classifier: Folder of the bundle.
        split: "train", "validation" or "test".

    Raises:
        InputError: A setting, the store or the classifier is wrong.

    Example:
        error = warmstate.evaluate("runs/c", store, classifier.folder)["error_percent"]
    """
    usual: dict[str, Setting] = {"classifier": str(classifier), "evaluate_split": split}
    return _run("evaluate", run_dir, store, log, usual | settings)[split]


def load_encoder(folder: str | Path) -> "TextEncoder":
    """Returns an encoder with its tokenizer: raw text in, (h, c) of each layer out.

    Args:
        folder: The bundle's, or its address, such as https://host/bundle: it is fetched once.

    Raises:
        InputError: There is no encoder bundle in `folder`, or it is damaged.

    Example:
        states = warmstate.load_encoder("runs/a/encoder")(["A fine film."])
    """
    _import_quietly()
    from trainer.inference.text_encoder import load_encoder

    return load_encoder(folder)


def load_classifier(folder: str | Path) -> "TextClassifier":
    """Returns a classifier with its tokenizer: raw text in, probabilities out.

    Args:
        folder: The bundle's, or its address, such as https://host/bundle: it is fetched once.

    Raises:
        InputError: There is no classifier bundle in `folder`, or it is damaged.

    Example:
        predictions = warmstate.load_classifier("runs/b/classifier").predict(["A fine film."])
    """
    _import_quietly()
    from trainer.inference.text_classifier import load_classifier

    return load_classifier(folder, flag="folder")


def predict(
    classifier: "TextClassifier | str | Path",
    texts: Sequence[str],
    contexts: Sequence[str | None] | None = None,
) -> "list[Prediction]":
    """Returns the label and the probabilities of each text, in order.

    Args:
        classifier: From `load_classifier`, or a bundle's folder.
        texts: Any number.
        contexts: Each text's context, such as its author, for a classifier of --context_key.

    Raises:
        InputError: There is no classifier bundle in the folder, it is damaged, or contexts do not
            fit.

    Example:
        (prediction,) = warmstate.predict("runs/b/classifier", ["A fine film."])
    """
    if isinstance(texts, str):
        raise InputError("texts is a single text: put it in a list")
    model = load_classifier(classifier) if isinstance(classifier, str | Path) else classifier
    return model.predict(texts, contexts)


def __getattr__(name: str) -> Any:
    if name == "states":
        _import_quietly()
        return importlib.import_module("trainer.states")
    if name == "TaskBank":
        _import_quietly()
        return importlib.import_module("trainer.inference.task_bank").TaskBank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _run(
    stage: str,
    run_dir: str | Path,
    store: "TokenStore | str | Path",
    log: Log,
    settings: dict[str, Setting],
) -> dict[str, Any]:
    """Runs a stage in this process; returns its report."""
    from data_pipelines.store.token_store import TokenStore
    from trainer.distribution.cluster import Cluster
    from trainer.preflight import faults_of

    opened = store if isinstance(store, TokenStore) else TokenStore(store)
    places = {"run_dir": str(run_dir), "store": str(opened.folder)}
    config = _config({"stage": stage, **places, **settings})
    alone = Cluster(rank=0, size=1)
    raise_if(faults_of(config, alone))
    with _process_kept():
        from trainer.stages.run_stage import run_stage

        run_stage(config, alone, log)
    return json.loads((Path(run_dir) / "report.json").read_text())


def _config(settings: dict[str, Setting]) -> "Config":
    from trainer.config import Config

    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Config)}
    _check_names(settings, list(kinds))
    faults = []
    for name, value in settings.items():
        kind = kinds[name]
        if kind is float and type(value) is int:
            settings[name] = float(value)
        elif type(value) is not kind:
            faults.append(f"{name}={value!r} is not of type {kind.__name__}")
    raise_if(faults)
    return Config(**settings)  # type: ignore[arg-type]


def _check_names(settings: dict[str, Any], known: list[str]) -> None:
    """Raises InputError if a setting is not among `known`; the message has the nearest."""
    raise_if(
        [
            f"{name} is not a setting{did_you_mean(name, known)}"
            for name in settings
            if name not in known
        ]
    )


def _sizes(encoder: Path) -> dict[str, Setting]:
    """Returns the settings that must be the encoder's."""
    _import_quietly()
    from trainer.config import Config
    from trainer.models import bundle

    model = bundle.read_info(encoder, "encoder", "encoder")["model"]
    sizes = model.keys() & Config.__dataclass_fields__.keys() - {"vocab_size"}
    return {name: model[name] for name in sizes}


@contextlib.contextmanager
def _process_kept() -> Iterator[None]:
    """Restores what a stage changes for its whole process: signals, and settings of TensorFlow.

    With determinism left on, the caller's random operations without a seed would raise errors. And
    TensorFlow keeps the gradient of each traced tf.custom_gradient for ever, and with it the graph
    and all weights of the stage.
    """
    _import_quietly()
    # There is no public way to read or undo either.
    from tensorflow.python.framework import config as tensorflow_config
    from tensorflow.python.framework import ops

    gradients = ops.gradient_registry._registry
    known = set(gradients)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    handlers = {number: signal.getsignal(number) for number in numbers}
    wakeup = signal.set_wakeup_fd(-1)  # an event loop's, as in a notebook
    deterministic = tensorflow_config.is_op_determinism_enabled()
    try:
        yield
    finally:
        if not deterministic:
            tensorflow_config.disable_op_determinism()
        for name in set(gradients) - known:
            if name.startswith("CustomGradient-"):
                del gradients[name]
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _import_quietly() -> None:
    from data_pipelines.quiet_tensorflow import import_quietly

    import_quietly()
