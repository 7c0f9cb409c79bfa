"""Where a linear head starts from: a logistic regression on what the frozen encoder's outputs say.

The mean output of a bag autoencoder is first mapped to the code that it reconstructs from.

Training everything at once from a random head distorts what pretraining learned before the head is
of use (Kumar et al. 2022). With few labels this start is most of the classifier, and it is better
once it has labelled documents itself (--self_training_documents).
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from scipy import special

from data_pipelines.store.split_view import SplitView
from trainer.distribution.over_batches import gather_rows
from trainer.models.classifier import Classifier
from trainer.stages.pretrain import pretraining_splits
from trainer.training import logistic_regression
from trainer.training.run import Run

# More labelled documents are not read: this is a start, not the end.
MAX_DOCUMENTS = 2_000
# On features whose squares add up to 1 on average.
PENALTY = 0.3
# Of a code the first axes are read: so many, or more with more labels.
MIN_AXES = 20
LABELS_PER_AXIS = 20
# Self-training: each round pseudo-labels this fraction of the unlabelled documents.
ROUNDS = 4
LIKELIEST = 0.5


def fit_head(
    run: Run, classifier: Classifier, labelled: SplitView, codes: Sequence[np.ndarray | None]
) -> None:
    """Sets the output layer of each direction of `classifier`, which has no hidden layer.

    A collective; the chief fits. No labels are read but those of `labelled`.

    Args:
        codes: For each direction the kernel of its code, [units, dim], or None. A code is that of
            the mean output, so other poolings do without.
    """
    config = run.config
    view = labelled.sample(min(MAX_DOCUMENTS, len(labelled)), config.seed)
    labels, features = head_inputs(run, classifier, view)
    if run.store.label_sets is not None:
        labels = run.store.label_sets[labels]
    others = None
    if config.self_training_documents:
        text = run.store.split(*pretraining_splits(run.store))
        text = text.sample(min(config.self_training_documents, len(text)), config.seed)
        _, others = head_inputs(run, classifier, text)
        run.log(f"finetune: the linear head pseudo-labels half of {len(text):,} documents too")
    heads: dict[str, np.ndarray] | None = None
    if run.is_chief:
        heads = {}
        for number, code in enumerate(codes):
            code = code if config.pooling == "mean" else None
            known = features[number], labels, classifier.num_classes, code
            with run.distributor.watchdog.local_work():
                head = fitted(*known) if others is None else self_trained(*known, others[number])
            heads |= dict(zip((f"{number}/kernel", f"{number}/bias"), head, strict=True))
    received = run.distributor.broadcast_arrays(heads)
    for number, direction in enumerate(classifier.directions()):
        direction.output_layer.kernel.assign(received[f"{number}/kernel"])
        direction.output_layer.bias.assign(received[f"{number}/bias"])
    run.log(f"finetune: the linear head starts from a logistic regression of {len(view):,} labels")


def head_inputs(
    run: Run, classifier: Classifier, view: SplitView
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the documents' labels, int32, and of each direction what its head reads.

    A collective. What a head reads is float32, [documents, width].
    """
    batches = run.all_documents(view, run.config.finetune_batch_size, run.config.tokens_classified)

    def columns(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        label = tf.cast(rows["labels"], tf.float32)[:, None]
        inputs = classifier.head_inputs(rows["tokens"], rows["lengths"], rows.get("contexts"))
        return tf.concat([label, *(tf.cast(each, tf.float32) for each in inputs)], axis=1)

    found = gather_rows(run.distributor, columns, batches, run.stop_request)
    parts = np.split(found[:, 1:], len(classifier.directions()), axis=1)
    return found[:, 0].astype(np.int32), parts


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


def self_trained(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    code: np.ndarray | None,
    others: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias of a head that is fitted to its own pseudo-labels too.

    Each round pseudo-labels the half of `others` that the head is most confident about, in the
    class proportions of `labels`, and fits the head again to both.

    Args:
        features: As for `fitted`, and so are `num_classes` and `code`.
        labels: Integers [documents].
        others: Features of unlabelled documents: [others, width].
    """
    shares = np.bincount(labels, minlength=num_classes) / len(labels)
    kernel, bias = fitted(features, labels, num_classes, code)
    for _ in range(ROUNDS):
        guessed = surest(others @ kernel + bias, LIKELIEST * shares)
        is_sure = guessed >= 0
        kernel, bias = fitted(
            np.concatenate([features, others[is_sure]]),
            np.concatenate([labels, guessed[is_sure]]),
            num_classes,
            code,
        )
    return kernel, bias


def surest(logits: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Returns a pseudo-label for each confidently classified document, -1 for others: [documents].

    A document among the likeliest of two classes gets none.

    Args:
        logits: [documents, outputs].
        shares: Fraction of all documents to label with each class: [classes].
    """
    is_binary = len(shares) == 2
    scores = np.hstack([-logits, logits]) if is_binary else special.log_softmax(logits, axis=1)
    taken = np.zeros(scores.shape, bool)
    for label, share in enumerate(shares):
        likeliest = np.argsort(-scores[:, label], kind="stable")
        taken[likeliest[: int(share * len(scores))], label] = True
    return np.where(taken.sum(axis=1) == 1, taken.argmax(axis=1), -1)
