"""--stage=finetune: from an encoder bundle and labelled text to a supervised LSTM."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan
from data_pipelines.store.split_view import SplitView, chunks
from trainer.config import Config
from trainer.distribution.variables import values_of
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.reporting import thresholds
from trainer.stages.evaluate import error_and_loss
from trainer.stages.finetune_batches import FinetuneBatches
from trainer.stages.finetune_loss import FinetuneLoss
from trainer.stages.init_embeddings import init_embeddings
from trainer.stages.linear_head import fit_head
from trainer.stages.pretrain import make_encoder, make_objective, pretraining_splits
from trainer.stages.split_predictions import predict
from trainer.stages.warm_start import warm_start
from trainer.training import loop
from trainer.training.optimizer import Rate
from trainer.training.run import Run, StoreBatches
from trainer.training.task import Result, Task

# Added to the run's seed for the second direction; initializers add less than this.
BACKWARD_SEED = 500


def finetune(run: Run, folder: Path) -> dict[str, Any]:
    """Trains a classifier in `folder` and writes the bundle `folder`/classifier.

    With a frozen encoder, it writes `folder`/task as well.

    Returns:
        For the report: steps, seconds, tokens_per_second, validation metrics, and for a warm start
        the broadcast: digests by worker, bytes, seconds. There are no validation metrics with
        --finetune_refit.
    """
    classifier, task, batches, report = set_up(run, folder)
    steps, refits = run.config.finetune_steps, run.config.finetune_refit
    if steps:
        result = loop.train(run, task, batches)
    else:
        metrics = {} if refits else task.evaluate()
        result = Result(metrics, steps=0, step=0, seconds=0.0, tokens_per_second=0.0)
    of_sets: dict[str, float] = {}
    if classifier.multi_label:
        report["thresholds"], of_sets = choose_thresholds(run, classifier)
    report |= {
        "labelled_documents": len(batches.labelled.view),
        "steps": result.steps,
        "best_step": steps if refits else result.step,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "validation": result.metrics | of_sets,
    }
    if run.is_chief:
        save_classifier(run, folder / "classifier", classifier, report)
        if run.config.train != "all":
            save_task(run, folder / "task", classifier, report)
        run.saved()
    return report


def set_up(run: Run, folder: Path) -> tuple[Classifier, Task, FinetuneBatches, dict[str, Any]]:
    """Returns the classifier at its start, what is trained, on what, and the report so far."""
    config = run.config
    view = labelled_documents(run)
    plan = run.plan(view, config.finetune_batch_size, config.finetune_max_tokens)
    classifier = make_classifier(run)
    if classifier.encoder.normalised:
        frequencies = word_frequencies(run)
        for direction in classifier.directions():
            direction.encoder.frequencies.assign(frequencies)
    report: dict[str, Any] = {
        "init_weights": config.init_weights,
        "initial_state": config.initial_state,
        "train": config.train,
    }
    if config.init_embeddings and config.init_weights == "random":
        for direction in classifier.directions():
            report["init_embeddings"] = init_embeddings(run, direction.encoder)
    encoders: dict[str, str] = {}
    codes: list[np.ndarray | None] = []
    trained = trained_variables(config, classifier)
    if config.reads_encoder:
        report["broadcast"], encoders, codes = warm_start(run, classifier, trained)
        report["encoder_sha256"] = encoders["--encoder"]
    if config.init_weights == "encoder" and classifier.hidden is None:
        fit_head(run, classifier, view, codes)
    validation = run.all_documents(
        run.store.split("validation"), config.finetune_batch_size, config.tokens_classified
    )
    run.log(
        f"{folder.name}: {len(view):,} labelled documents, {plan.steps_per_epoch:,} steps an "
        f"epoch, {config.finetune_steps:,} steps to do; weights: {config.init_weights}, "
        f"state: {config.initial_state}"
    )
    run.log_shapes(folder.name, plan)
    objective, softmax = None, {}
    if config.joint_weight:
        with run.distributor.scope():
            objective = make_objective(run, classifier.encoder)
        # Its variables besides the encoder's; no bundle holds them.
        decoder = bundle.decoder_variables(objective)
        softmax = {f"objective/{name}": variable for name, variable in decoder.items()}
    task = Task(
        name="finetune",
        folder=folder,
        stage=config.of_stage("finetune"),
        variables=trained | softmax,
        loss_sum=FinetuneLoss(
            config, classifier, objective, class_weights(run, view), run.store.label_sets
        ),
        evaluate=error_and_loss(run, classifier, validation),
        rates=encoder_rates(config, classifier),
        select_by=_selects_by(config, classifier),
        # Each sitting of --stage=all writes its encoder again: on another number of workers its
        # mean state differs in the last bits.
        inputs={"--store": run.store.sha256} | ({} if config.trains_encoder else encoders),
    )
    batches = FinetuneBatches(run.batches(view, plan), unlabelled_documents(run, plan))
    return classifier, task, batches, report


def _selects_by(config: Config, classifier: Classifier) -> str:
    """Returns the metric whose best weights are kept; "" if nothing is evaluated."""
    if config.finetune_refit:
        return ""
    return "f1_error_percent" if classifier.multi_label else "error_percent"


def labelled_documents(run: Run) -> SplitView:
    """Returns the train split, with --finetune_refit the validation split too, or some of these."""
    if run.config.finetune_refit:
        view = run.store.split("train", "validation")
        run.log("finetune: a refit: validation documents are trained on, nothing is evaluated")
    else:
        view = run.store.split("train")
    wanted = run.config.finetune_documents
    return view.sample(wanted, run.config.seed) if wanted else view


def choose_thresholds(run: Run, classifier: Classifier) -> tuple[list[float], dict[str, float]]:
    """Returns the probability from which each class is answered, and the metrics with them.

    A collective. They give each class its highest F1 on the validation split.
    """
    config, view = run.config, run.store.split("validation")
    size = (config.finetune_batch_size, config.tokens_classified)
    found = predict(run, classifier, view, *size)
    best = thresholds.best(found.probabilities(), found.tensors["labels"])
    return best, dataclasses.replace(found, info={"thresholds": best}).metrics()


def class_weights(run: Run, view: SplitView) -> np.ndarray | None:
    """Returns the weights of --class_weights=balanced, float32 [classes]; None without.

    The documents' mean weight is 1. A class without documents has weight 0. With sets of labels,
    documents that have a class get its weight in its loss, and those that lack it 1.
    """
    if run.config.class_weights == "none":
        return None
    sets = run.store.label_sets
    counts = np.zeros(run.store.num_classes if sets is None else len(sets), np.int64)
    for chunk in chunks(len(view)):
        counts += np.bincount(view.labels_of(chunk), minlength=len(counts))
    if sets is not None:
        having = counts @ sets
        return ((len(view) - having) / np.maximum(having, 1)).astype(np.float32)
    weights = len(view) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, weights, 0).astype(np.float32)


def unlabelled_documents(run: Run, labelled: BatchPlan) -> StoreBatches | None:
    """Returns batches of --unlabelled_batch_size documents; None if that is 0.

    Args:
        labelled: The plan of the documents that they are joined with.
    """
    batch_size, split = run.config.unlabelled_batch_size, "unsupervised"
    if not batch_size:
        return None
    view = run.store.split(split)
    plan = run.plan(view, batch_size, run.config.finetune_max_tokens, beside=labelled)
    return run.batches(view, plan)


def word_frequencies(run: Run) -> np.ndarray:
    """Returns each word's frequency in the training text: float32 [vocab_size], sum 1.

    A collective; only the chief counts.
    """
    counted = None
    if run.is_chief:
        view = run.store.split(*pretraining_splits(run.store))
        counts = view.token_counts(run.store.vocab_size)
        counted = {"frequencies": (counts / counts.sum()).astype(np.float32)}
    return run.distributor.broadcast_arrays(counted)["frequencies"]


def make_classifier(run: Run) -> Classifier:
    """Returns a new classifier, its weights drawn from the run's seed."""
    vocab_size = run.store.vocab_size
    with_reader = run.config.initial_state == "encode"

    def direction(config: Config, backward: Classifier | None = None) -> Classifier:
        encoder = make_encoder(config, vocab_size, normalised=config.normalises_embeddings)
        for lstm in encoder.lstms:
            lstm.clip_norm = config.finetune_recurrent_clip_norm
        return Classifier(
            encoder,
            num_classes=run.store.num_classes,
            hidden_units=config.hidden_units,
            reader=make_encoder(config, vocab_size) if with_reader else None,
            pooling=config.pooling,
            backward=backward,
            num_contexts=len(run.store.context_names) if config.context_key else 0,
            multi_label=run.store.label_sets is not None,
        )

    with run.distributor.scope():
        backward = None
        if run.config.backward_encoder and run.config.reads_encoder:
            other = dataclasses.replace(run.config, seed=run.config.seed + BACKWARD_SEED)
            backward = direction(other)
        classifier = direction(run.config, backward)
        classifier.build()
    return classifier


def trained_variables(config: Config, classifier: Classifier) -> dict[str, keras.Variable]:
    """Returns the variables that --train names, and freezes the others.

    The reader's are always frozen. With "all", so is a state that is not learned.
    """
    parts = config.train.split("+")
    weights = "all" in parts
    trains = {
        "reader": False,
        "frequencies": False,
        "initial_state": "state" in parts or (weights and config.initial_state == "learned"),
        "bias": weights or "bias" in parts,
        "hidden": True,
        "output": True,
    }
    variables = bundle.classifier_variables(classifier)
    for name, variable in variables.items():
        kind = name.removeprefix("backward/").split("/")
        part = kind[-1] if kind[0] == "lstm" else kind[0]
        variable.trainable = trains.get(part, weights)
    return {name: variable for name, variable in variables.items() if variable.trainable}


def encoder_rates(config: Config, classifier: Classifier) -> dict[str, Rate]:
    """Returns the learning rates of weights that come from the encoder, by layer.

    The head is above all layers; below it are the LSTMs, then the embeddings. A learned state has
    the head's rate.
    """
    if config.init_weights != "encoder":
        return {}
    encoder = bundle.encoder_variables(classifier.encoder)
    depth = {
        name: 1 + config.num_layers - (int(name.split("/")[1]) + 1 if "/" in name else 0)
        for name in encoder
    }
    rates = {
        name: Rate(
            config.encoder_rate * config.layer_rate**below,
            config.encoder_frozen_steps + config.unfreeze_every_steps * below,
        )
        for name, below in depth.items()
    }
    if classifier.backward is not None:
        rates |= {f"backward/{name}": rate for name, rate in rates.items()}
    return {name: rate for name, rate in rates.items() if rate != Rate(1.0, 0)}


def save_classifier(run: Run, folder: Path, classifier: Classifier, report: dict[str, Any]) -> None:
    """Writes the classifier bundle."""
    info = {
        **_read_and_told(run),
        "model": bundle.classifier_model(classifier),
        **_contexts(run),
        **({"thresholds": report["thresholds"]} if classifier.multi_label else {}),
        "tokenizer": run.store.tokenizer_config,
        "report": report,
        "config": dataclasses.asdict(run.config),
    }
    tensors = values_of(bundle.classifier_variables(classifier))
    bundle.save(folder, "classifier", tensors, info, run.store.vocab_path)
    run.log(f"finetune: wrote {folder}")


def save_task(run: Run, folder: Path, classifier: Classifier, report: dict[str, Any]) -> None:
    """Writes the task bundle: what was trained on top of the frozen encoder."""
    model = bundle.classifier_model(classifier)
    info = {
        **_read_and_told(run),
        "model": {size: model[size] for size in (*bundle.MODEL_SIZES["task"], "pooling")},
        "encoder_sha256": report["encoder_sha256"],
        "train": run.config.train,
        "validation": report["validation"],
    }
    bundle.save(folder, "task", bundle.task_tensors(classifier, run.config.train), info, None)
    run.log(f"finetune: wrote {folder}")


def _contexts(run: Run) -> dict[str, Any]:
    """Returns what a classifier's bundle says of contexts."""
    key = run.config.context_key
    return {"context_key": key, "context_names": list(run.store.context_names)} if key else {}


def _read_and_told(run: Run) -> dict[str, Any]:
    """Returns what a classifier and a task say of what they read and tell apart."""
    return {
        "max_tokens": run.config.tokens_classified,
        "vocab_sha256": run.store.vocab_sha256,
        "class_names": list(run.store.class_names),
        "tensorflow_version": tf.__version__,
    }
