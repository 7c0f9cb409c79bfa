"""The folder `predictions` of a run: a classifier's output for each document of a split.

predictions.safetensors has, by document in the order of reading, `document` (its number in the
split), `label`, `logits` and `loss`; for some documents it has the state in which the LSTM ended:
`state/label`, `state/h`, `state/c`. predictions.json has the split, the tensors' shapes and some
documents token by token: the most wrong ones and the surest right ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
            state/h and state/c float32 [m, units], of the last layer.
        info: The content of predictions.json; empty before it is written.
    """

    tensors: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> np.ndarray:
        """The right classes: int32 [n]."""
        return self.tensors["label"]

    def probability_of(self, classes: np.ndarray) -> np.ndarray:
        """Returns the probability of a class for each document: float64 [n].

        Args:
            classes: Integers [n].
        """
        logits = self.tensors["logits"]
        rows = max(1, CHUNK_LOGITS // logits.shape[1])
        chunks = [
            np.take_along_axis(
                probabilities(logits[start : start + rows]),
                classes[start : start + rows, None],
                axis=1,
            )[:, 0]
            for start in range(0, len(logits), rows)
        ]
        return np.concatenate(chunks)

    @property
    def predicted(self) -> np.ndarray:
        """The most probable classes: int64 [n]."""
        logits = self.tensors["logits"]
        if logits.shape[1] == 1:
            return (logits[:, 0] > 0).astype(np.int64)
        return logits.argmax(axis=1)

    @property
    def is_wrong(self) -> np.ndarray:
        """Bool [n]."""
        return self.predicted != self.label

    def metrics(self) -> dict[str, Any]:
        """Returns error_percent, loss (nats), f1_macro, roc_auc and documents.

        f1_macro is the mean over the classes that a label or a prediction names. roc_auc is for two
        classes, if the documents have both.
        """
        from sklearn.metrics import f1_score, roc_auc_score  # a second, which few programs need

        found: dict[str, Any] = {
            "error_percent": float(100 * self.is_wrong.mean(dtype=np.float64)),
            "loss": float(self.tensors["loss"].mean(dtype=np.float64)),
            "f1_macro": float(f1_score(self.label, self.predicted, average="macro")),
        }
        logits = self.tensors["logits"]
        if logits.shape[1] == 1 and np.ptp(self.label):
            found["roc_auc"] = float(roc_auc_score(self.label, logits[:, 0]))
        return found | {"documents": len(self.label)}


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the probability of each class: float64 [n, classes].

    Args:
        logits: [n, 1] for two classes, else [n, classes].
    """
    logits = np.asarray(logits, np.float64)
    if logits.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


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
    if type(classes) is not int or classes < 2:
        return f"'classes' is {classes!r:.99}"
    outputs = 1 if classes == 2 else classes
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
            or labels.size
            and not 0 <= labels.min() <= labels.max() < classes
        ):
            return f"{name!r} holds what is no class"
    rows = len(tensors.get("state/label", ()))
    for name in ("state/h", "state/c"):
        if len(shapes.get(name, ())) != 2 or shapes[name][0] != rows or not shapes[name][1]:
            return f"{name!r} is of shape {shapes.get(name)} for {rows} labels"
    if not all(np.isfinite(array).all() for array in tensors.values()):
        return "numbers that are not finite"
    return _examples_fault(info.get("examples"), classes)


def _examples_fault(examples: Any, classes: int) -> str | None:
    if not isinstance(examples, list):
        return "'examples' is no list"
    for example in examples:
        try:
            pieces, added = example["pieces"], example["contributions"]
            good = (
                len(pieces) == len(added)
                and all(isinstance(piece, str) for piece in pieces)
                and all(_is_finite(x) for x in [*added, example["probability"]])
                and all(example[name] in range(classes) for name in ("label", "predicted"))
            )
        except (KeyError, TypeError) as error:
            return f"an example: {error!r:.99}"
        if not good:
            return "an example does not hold what it must"
    return None


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)
