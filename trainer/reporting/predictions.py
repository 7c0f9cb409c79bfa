"""The folder `predictions` of a run: a classifier's output for each document of a split.

predictions.safetensors has, by document in the order of reading, `document` (its number in the
split), `label`, `logits` and `loss`; for some documents it has the state in which the LSTM ended:
`state/label`, `state/h`, `state/c`. With --labels=multi, `labels` has the classes of each document,
`label` is the number of its set in the store, and there are no states. predictions.json has the
split, the tensors' shapes and some documents token by token: the most wrong ones and the surest
right ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from data_pipelines.durable import Buffer, write_folder
from trainer.safe_files import (
    DamagedError,
    read_sealed,
    read_tensors,
    sealed,
    specs,
    tensor_parts,
)

EXAMPLE_TOKENS = 1000  # of a document are kept and shown, the last ones
CHUNK_LOGITS = 1 << 22  # are computed at once: 30,000 classes of all documents exceed the memory


@dataclass(frozen=True)
class Predictions:
    """A classifier's output for n documents.

    Attributes:
        tensors: document int64 [n], label int32 [n], logits float32 [n, 1] for two classes, else
            [n, classes], loss float32 [n] in nats (missing in older files); state/label int32 [m],
            state/h and state/c float32 [m, units], of the last layer. With --labels=multi also
            labels uint8 [n, classes], and logits are [n, classes] whatever their number.
        info: The content of predictions.json; empty before it is written.
    """

    tensors: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> np.ndarray:
        """The right classes: int32 [n]."""
        return self.tensors["label"]

    @property
    def has_sets(self) -> bool:
        """Whether documents have sets of labels."""
        return "labels" in self.tensors

    @property
    def thresholds(self) -> np.ndarray:
        """The probabilities from which classes of sets are answered: float64 [classes]."""
        classes = self.tensors["logits"].shape[1]
        return np.array(self.info.get("thresholds", [0.5] * classes))

    def probabilities(self) -> np.ndarray:
        """Returns the probability of each class of sets: float64 [n, classes]."""
        with np.errstate(over="ignore"):  # to infinity, whose inverse is 0
            return 1 / (1 + np.exp(-self.tensors["logits"].astype(np.float64)))

    def probability_of(self, classes: np.ndarray) -> np.ndarray:
        """Returns the probability of each document's class in `classes` [n]: float64 [n]."""
        logits, found = self.tensors["logits"], []
        rows = max(1, CHUNK_LOGITS // logits.shape[1])
        for some in (slice(i, i + rows) for i in range(0, len(logits), rows)):
            found.append(probabilities(logits[some])[np.arange(len(classes[some])), classes[some]])
        return np.concatenate(found)

    @property
    def predicted(self) -> np.ndarray:
        """The most probable classes: int64 [n]; of sets, bool [n, classes]."""
        logits = self.tensors["logits"]
        if self.has_sets:
            return self.probabilities() >= self.thresholds
        if logits.shape[1] == 1:
            return (logits[:, 0] > 0).astype(np.int64)
        return logits.argmax(axis=1)

    @property
    def is_wrong(self) -> np.ndarray:
        """Bool [n]; a set is wrong unless each of its classes is right."""
        if self.has_sets:
            return (self.predicted != self.tensors["labels"]).any(axis=1)
        return self.predicted != self.label

    def metrics(self) -> dict[str, Any]:
        """Returns error_percent, loss (nats), f1_macro, roc_auc and documents; f1_micro of sets.

        f1_macro is the mean over the classes that a label or a prediction names. roc_auc is for two
        classes, if the documents have both; of sets, the mean of the classes that some documents
        have and others have not.
        """
        from sklearn.metrics import f1_score, roc_auc_score  # a second, which few programs need

        found: dict[str, Any] = {
            "error_percent": float(100 * self.is_wrong.mean(dtype=np.float64)),
            "loss": float(self.tensors["loss"].mean(dtype=np.float64)),
        }
        if self.has_sets:
            return found | self.means_over_classes() | {"documents": len(self.label)}
        found["f1_macro"] = float(f1_score(self.label, self.predicted, average="macro"))
        logits = self.tensors["logits"]
        if logits.shape[1] == 1 and np.ptp(self.label):
            found["roc_auc"] = float(roc_auc_score(self.label, logits[:, 0]))
        return found | {"documents": len(self.label)}

    def means_over_classes(self) -> dict[str, float]:
        """Returns f1_micro, f1_macro and roc_auc of sets; see `metrics`."""
        table = self.by_class()
        figures = {name: np.array([row[name] for row in table]) for name in ("f1", "roc_auc")}
        labels, predicted = self.tensors["labels"], self.predicted
        named = labels.any(axis=0) | predicted.any(axis=0)
        right, both = (labels & predicted).sum(), labels.sum() + predicted.sum()
        found = {
            "f1_micro": float(2 * right / max(both, 1)),
            "f1_macro": float(figures["f1"][named].mean()) if named.any() else 0.0,
        }
        areas = figures["roc_auc"][~np.isnan(figures["roc_auc"])]
        return found | ({"roc_auc": float(areas.mean())} if len(areas) else {})

    def by_class(self) -> list[dict[str, float]]:
        """Returns precision, recall, f1, roc_auc, threshold and documents of each class of sets.

        What is undefined is 0; roc_auc NaN.
        """
        from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

        labels = self.tensors["labels"]
        figures = precision_recall_fscore_support(labels, self.predicted, zero_division=0)
        names = ("precision", "recall", "f1", "documents", "roc_auc", "threshold")
        areas = [
            roc_auc_score(truth, logits) if np.ptp(truth) else np.nan
            for truth, logits in zip(labels.T, self.tensors["logits"].T, strict=True)
        ]
        rows = zip(*figures, areas, self.thresholds, strict=True)
        return [dict(zip(names, map(float, row), strict=True)) for row in rows]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of each class: float64 [n, classes].

    Args:
        logits: [n, 1] for two classes, else [n, classes].
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    return special.softmax(logits, axis=1)


def start_of(values: Mapping[str, Any]) -> str:
    """Returns the start that `init_weights` and `initial_state` describe.

    Args:
        values: Flags, or predictions.json.

    Returns:
        "warm", "scratch", or "classifier" if either is missing.
    """
    weights, state = values.get("init_weights"), values.get("initial_state")
    if weights is None or state is None:
        return "classifier"
    return "scratch" if (weights, state) == ("random", "zero") else "warm"


def write(folder: Path, predictions: Predictions) -> None:
    """Writes the folder, replacing an older one.

    Raises:
        OSError: It cannot be written.
    """
    info = predictions.info | {"tensors": specs(predictions.tensors)}
    files: dict[str, bytes | Sequence[Buffer]] = {
        "predictions.safetensors": tensor_parts(predictions.tensors),
        "predictions.json": sealed(info),
    }
    write_folder(folder.with_name(folder.name + ".new"), folder, files)


def read(folder: Path) -> Predictions:
    """Returns the predictions in `folder`.

    Raises:
        DamagedError: A file is missing or damaged, or its content contradicts itself.
    """
    info = read_sealed(folder / "predictions.json")
    tensors = read_tensors(folder / "predictions.safetensors", info.get("tensors"))
    if fault := _fault(info, tensors):
        raise DamagedError(f"{folder} is damaged: {fault}")
    return Predictions(tensors, info)


def _fault(info: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str | None:
    classes = info.get("classes")
    if type(classes) is not int or classes < (1 if "labels" in tensors else 2):
        return f"'classes' is {classes!r:.99}"
    has_sets = "labels" in tensors
    outputs = 1 if classes == 2 and not has_sets else classes
    shapes = {name: array.shape for name, array in tensors.items()}
    documents = len(tensors.get("label", ()))
    if shapes.get("logits") != (documents, outputs) or not documents:
        return f"logits of shape {shapes.get('logits')} for {documents} labels, {classes} classes"
    if shapes.get("document") != (documents,):
        return f"documents of shape {shapes.get('document')} for {documents} labels"
    for name in ("label", "state/label"):
        labels = tensors.get(name, np.zeros(0, np.int32))
        if (
            labels.dtype.kind != "i"
            or labels.ndim != 1
            or (
                labels.size
                and not 0 <= labels.min() <= labels.max() < (2**31 if has_sets else classes)
            )
        ):
            return f"{name!r} holds a number that is not a class"
    if has_sets and (fault := _sets_fault(info, tensors["labels"], (documents, classes))):
        return fault
    rows = len(tensors.get("state/label", ()))
    for name in ("state/h", "state/c"):
        if len(shapes.get(name, ())) != 2 or shapes[name][0] != rows or not shapes[name][1]:
            return f"{name!r} is of shape {shapes.get(name)} for {rows} labels"
    if not all(np.isfinite(array).all() for array in tensors.values()):
        return "numbers that are not finite"
    return _examples_fault(info.get("examples"), classes)


def _sets_fault(info: Mapping[str, Any], labels: np.ndarray, shape: tuple[int, int]) -> str | None:
    if labels.shape != shape or labels.dtype != np.uint8 or labels.max() > 1:
        return f"'labels' of shape {labels.shape} and type {labels.dtype} are no sets of classes"
    found = info.get("thresholds")
    if not isinstance(found, list) or len(found) != shape[1] or not all(map(_is_finite, found)):
        return f"'thresholds' is {found!r:.99}"
    return None


def _examples_fault(examples: Any, classes: int) -> str | None:
    if not isinstance(examples, list):
        return "'examples' is not a list"
    for example in examples:
        try:
            pieces, added = example["pieces"], example["contributions"]
            good = (
                len(pieces) == len(added)
                and all(isinstance(piece, str) for piece in pieces)
                and all(_is_finite(x) for x in [*added, example["probability"]])
                and all(_are_classes(example[name], classes) for name in ("label", "predicted"))
                and example.get("explained", 0) in range(classes)
            )
        except (KeyError, TypeError) as error:
            return f"an example: {error!r:.99}"
        if not good:
            return "an example does not hold what it must"
    return None


def _are_classes(value: Any, classes: int) -> bool:
    """Returns whether it is a class, or a list of classes."""
    return all(each in range(classes) for each in (value if isinstance(value, list) else [value]))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)
