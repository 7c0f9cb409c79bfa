"""Where a linear head starts from: a logistic regression on what the frozen encoder's outputs say.

The mean output of a bag autoencoder is first mapped to the code that it reconstructs from.

Training everything at once from a random head distorts what pretraining learned before the head is
of use (Kumar et al. 2022). With few labels this start is most of the classifier.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from data_pipelines.store.split_view import SplitView
from trainer.distribution.over_batches import gather_rows
from trainer.models.classifier import Classifier
from trainer.training import logistic_regression
from trainer.training.run import Run

# More labelled documents are not read: this is a start, not the end.
MAX_DOCUMENTS = 2_000
# On features whose squares add up to 1 on average.
PENALTY = 0.3
# Of a code the first axes are read: so many, or more with more labels.
MIN_AXES = 20
LABELS_PER_AXIS = 20


def fit_head(
    run: Run, classifier: Classifier, labelled: SplitView, codes: Sequence[np.ndarray | None]
) -> None:
    """Sets the output layer of each direction of `classifier`, which has no hidden layer.

    A collective; the chief fits. Labelled documents alone are read.

    Args:
        codes: For each direction the kernel of its code, [units, dim], or None. A code is that of
            the mean output, so other poolings do without.
    """
    config = run.config
    view = labelled.sample(min(MAX_DOCUMENTS, len(labelled)), config.seed)
    batches = run.all_documents(view, config.finetune_batch_size, config.tokens_classified)

    def columns(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        label = tf.cast(rows["labels"], tf.float32)[:, None]
        inputs = classifier.head_inputs(rows["tokens"], rows["lengths"], rows.get("contexts"))
        return tf.concat([label, *(tf.cast(each, tf.float32) for each in inputs)], axis=1)

    found = gather_rows(run.distributor, columns, batches, run.stop_request)
    label, features = found[:, 0].astype(np.int32), found[:, 1:]
    if run.store.label_sets is not None:
        label = run.store.label_sets[label]
    heads: dict[str, np.ndarray] | None = None
    if run.is_chief:
        parts = np.split(features, len(classifier.directions()), axis=1)
        heads = {}
        for number, (part, code) in enumerate(zip(parts, codes, strict=True)):
            code = code if config.pooling == "mean" else None
            kernel, bias = fitted(part, label, classifier.num_classes, code)
            heads |= {f"{number}/kernel": kernel, f"{number}/bias": bias}
    received = run.distributor.broadcast_arrays(heads)
    for number, direction in enumerate(classifier.directions()):
        direction.output_layer.kernel.assign(received[f"{number}/kernel"])
        direction.output_layer.bias.assign(received[f"{number}/bias"])
    run.log(f"finetune: the linear head starts from a logistic regression of {len(view):,} labels")


def fitted(
    features: np.ndarray, labels: np.ndarray, num_classes: int, code: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias, float32, of the head that reads `features` as they are.

    They are centred, mapped by `code` and scaled before the regression, and the head's weights take
    that over. With few labels only the first axes of the code are read, those in which documents
    differ most.

    Args:
        features: [documents, width].
        labels: As `logistic_regression.fit` takes them.
        code: [width, dim]; None leaves features as they are.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    if code is None:
        code = np.eye(features.shape[1])
    else:
        axes = max(MIN_AXES, len(labels) // LABELS_PER_AXIS)
        code = code[:, :axes].astype(np.float64)
        centred = centred @ code
    scale = max(np.sqrt(np.square(centred).sum(axis=1).mean()), 1e-12)
    kernel, bias = logistic_regression.fit(centred / scale, labels, num_classes, PENALTY)
    kernel = code @ kernel / scale
    return kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)
