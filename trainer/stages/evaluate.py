"""--stage=evaluate: a classifier bundle and a labelled split -> its error."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.store.split_view import SplitView
from trainer.distribution.over_batches import sum_over_batches
from trainer.distribution.variables import assign
from trainer.models import bundle
from trainer.models.classifier import Classifier, losses_and_errors, targets
from trainer.stages.split_predictions import predict, save
from trainer.training.run import Run

BATCH_SIZE = 64


def evaluate(run: Run, classifier_folder: Path, split: str, folder: Path) -> dict[str, Any]:
    """Returns the classifier's error_percent, loss and the number of documents of `split`.

    What it says of each document goes to `folder`/predictions; see reporting/predictions.py.
    """
    classifier, view, info = _set_up(run, classifier_folder, split)
    predictions = predict(run, classifier, view, BATCH_SIZE, info["max_tokens"])
    if classifier.multi_label:
        of_bundle = {"thresholds": info["thresholds"]}
        predictions = dataclasses.replace(predictions, info=of_bundle)
    if run.is_chief:
        save(folder / "predictions", predictions, run, classifier, split, info)
    return predictions.metrics()


def errors_alone(run: Run, classifier_folder: Path, split: str) -> dict[str, float]:
    """Returns error_percent, loss and documents as `evaluate` does, and writes nothing.

    It is quicker for a classifier whose single documents nobody looks at. Of sets of labels it
    knows no thresholds.
    """
    classifier, view, info = _set_up(run, classifier_folder, split)
    batches = run.all_documents(view, BATCH_SIZE, info["max_tokens"])
    return error_and_loss(run, classifier, batches)()


def _set_up(
    run: Run, classifier_folder: Path, split: str
) -> tuple[Classifier, SplitView, dict[str, Any]]:
    """Returns the classifier in every worker, the documents, and what its bundle says."""
    loaded = bundle.load(classifier_folder, "classifier", "--classifier") if run.is_chief else None
    info = run.distributor.gather_objects(loaded.info if loaded else None)[0]
    tensors = run.distributor.broadcast_arrays(loaded.tensors if loaded else None)
    names = info.get("context_names", [])
    if names and names != list(run.store.context_names):
        raise InputError(
            f"--classifier={classifier_folder} has the contexts ({info['context_key']}) of another "
            f"store than {run.store.folder}: name the --store that it was trained on"
        )
    with run.distributor.scope():
        classifier = bundle.new_classifier(info["model"])
    assign(bundle.classifier_variables(classifier), tensors)
    view = run.store.split(split)
    if run.config.classify_max_tokens:
        info = {**info, "max_tokens": run.config.classify_max_tokens}
    run.log(f"evaluate: {classifier_folder} on {len(view):,} documents of {split}")
    return classifier, view, info


def error_and_loss(
    run: Run, classifier: Classifier, batches: tf.data.Dataset
) -> Callable[[], dict[str, float]]:
    """Returns a collective that gives error_percent, loss (nats) and documents over `batches`.

    With sets of labels also `f1_error_percent`, 100 minus the micro F1 at thresholds of 0.5.
    """
    label_sets = run.store.label_sets

    def sums(rows: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        logits = classifier.logits(
            rows["tokens"], rows["lengths"], training=False, contexts=rows.get("contexts")
        )
        labels, weights = targets(rows["labels"], label_sets), rows["weights"]
        losses, errors = losses_and_errors(logits, labels)
        found = [errors, losses, tf.ones_like(losses)]
        if label_sets is not None:
            answered = tf.cast(logits > 0, tf.float32)
            found += [tf.reduce_sum(abs(answered - labels), 1), tf.reduce_sum(answered + labels, 1)]
        return [tf.reduce_sum(x * weights) for x in found]

    total = sum_over_batches(run.distributor, sums, batches, run.stop_request)

    def evaluated() -> dict[str, float]:
        errors, loss, documents, *of_sets = total()
        found = {
            "error_percent": float(100 * errors / documents),
            "loss": float(loss / documents),
            "documents": int(documents),
        }
        if of_sets:
            wrong, named = of_sets
            found["f1_error_percent"] = float(100 * wrong / max(named, 1))
        return found

    return evaluated
