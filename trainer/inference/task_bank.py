"""Tasks of a frozen encoder: each alone, or rows of different tasks in one batch.

A task bundle is what fine-tuning with --train=head, state, bias or state+bias adds to an encoder:
an initial state, biases if they were trained, and a head.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.flag_fields import did_you_mean
from trainer.distribution.variables import assign
from trainer.inference.text_classifier import (
    Prediction,
    TextClassifier,
    batches_by_length,
    bundle_tokenizer,
    distinct_class_names,
    prediction_of,
)
from trainer.models import bundle
from trainer.models.bundle import Bundle
from trainer.models.classifier import POOLED_VECTORS, pooled
from trainer.models.encoder import row_biases, token_mask

Folder = str | Path


def load_task(encoder: Folder, task: Folder) -> TextClassifier:
    """Returns a task with its encoder, as a classifier.

    Raises:
        InputError: A bundle is missing or damaged, or the task belongs to another encoder.
    """
    folder = Path(encoder)
    loaded = bundle.load(folder, "encoder", "--encoder")
    of_task = _load(Path(task), loaded)
    one_way = {"reads_first": False, "normalised": False, "bidirectional": False}
    classifier = bundle.new_classifier({**of_task.info["model"], **loaded.info["model"], **one_way})
    assign(bundle.classifier_variables(classifier), {**loaded.tensors, **of_task.tensors})
    return TextClassifier(
        classifier,
        bundle_tokenizer(folder, loaded.info, "--encoder"),
        distinct_class_names(of_task.info, f"--task={task}"),
        of_task.info["max_tokens"],
    )


class TaskBank:
    """One encoder and many tasks: rows of different tasks are read in one batch.

    Each row starts from its task's state, has its task's biases, and goes to its task's head, all
    by gather. All tasks must have the same --pooling and --hidden_units.

    Attributes:
        tokenizer: The encoder's.
        class_names: By task, in the order of its classes.
    """

    def __init__(self, encoder: Folder, tasks: Folder | Mapping[str, Folder]):
        """Loads the bundles.

        Args:
            encoder: Folder of the encoder bundle.
            tasks: Folders of task bundles by name; or the folder that holds them, by their names.

        Raises:
            InputError: A bundle is missing or damaged, a task belongs to another encoder, or the
                heads of two tasks read different things.
        """
        loaded = bundle.load(Path(encoder), "encoder", "--encoder")
        self.tokenizer = bundle_tokenizer(Path(encoder), loaded.info, "--encoder")
        folders = _folders_in(Path(tasks)) if isinstance(tasks, str | Path) else tasks
        found = {name: _load(Path(folder), loaded) for name, folder in folders.items()}
        self.class_names = {
            name: distinct_class_names(task.info, f"--tasks={folders[name]}")
            for name, task in found.items()
        }
        self._number = {name: number for number, name in enumerate(found)}
        self._max_tokens = np.array([task.info["max_tokens"] for task in found.values()])
        self._pooling = _shared(found, "pooling")
        self._encoder = bundle.encoder_of(loaded)
        self._states, self._biases = _of_lstms(loaded, list(found.values()))
        self._layers = _of_heads(_shared(found, "hidden_units"), list(found.values()))

    def head_inputs(self, tokens: tf.Tensor, lengths: tf.Tensor, tasks: tf.Tensor) -> tf.Tensor:
        """Returns what the heads read: [batch, vectors * units], the bits of each task alone.

        Arguments as for `logits`.
        """
        states, biases = tf.nest.map_structure(
            lambda of_all: tf.gather(of_all, tasks), (self._states, self._biases)
        )
        mask = token_mask(tokens, lengths)
        with row_biases(self._encoder, biases):
            words = self._encoder.words(tokens)
            outputs, final = self._encoder.read(words, mask, states, training=False)
        return pooled(self._pooling, outputs, final[-1][0], mask)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None], tf.int32),
            *[tf.TensorSpec([None], tf.int32)] * 2,
        ],
        autograph=False,
    )
    def logits(self, tokens: tf.Tensor, lengths: tf.Tensor, tasks: tf.Tensor) -> tf.Tensor:
        """Returns logits, minus infinity beyond a task's classes: float32 [batch, most classes].

        Args:
            tokens: int32 [batch, time], right-padded.
            lengths: int32 [batch].
            tasks: int32 [batch], the number of each row's task.
        """
        found = self.head_inputs(tokens, lengths, tasks)
        for layer, (kernel, bias) in enumerate(self._layers):
            found = tf.nn.relu(found) if layer else found
            products = tf.einsum("bi,bio->bo", found, tf.gather(kernel, tasks))
            found = products + tf.gather(bias, tasks)
        return found

    def probabilities(
        self, texts: Sequence[str], tasks: Sequence[str], batch_size: int = 64
    ) -> list[np.ndarray]:
        """Returns the probability of each class of a text's task, in order: float32 [classes].

        Texts of similar length are read together, whatever their tasks.

        Args:
            tasks: The name of each text's task.
            batch_size: Number of texts that are read together.

        Raises:
            InputError: There is no task of a name.
        """
        numbers = np.array([self.number(task) for task in tasks], np.int32)
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(texts)
        if not len(texts):
            return found
        ids = self.tokenizer.rows(texts)
        limits = self._max_tokens[numbers]
        for rows, tokens, lengths in batches_by_length(ids, limits, batch_size):
            values = tf.nn.softmax(self.logits(tokens, lengths, numbers[rows])).numpy()
            for row, of_row in zip(rows, values, strict=True):
                found[row] = of_row[: len(self.class_names[tasks[row]])]
        return found

    def predict(self, texts: Sequence[str], tasks: str | Sequence[str]) -> list[Prediction]:
        """Returns the predictions in the order of the texts.

        Args:
            tasks: The name of each text's task, or of the task of all.

        Raises:
            InputError: There is no task of a name.
        """
        names = [tasks] * len(texts) if isinstance(tasks, str) else tasks
        values = self.probabilities(texts, names)
        return [self.prediction(*pair) for pair in zip(values, names, strict=True)]

    def prediction(self, probabilities: np.ndarray, task: str) -> Prediction:
        """Returns the prediction of a text with these probabilities [classes of its task]."""
        return prediction_of(probabilities, self.class_names[task])

    def number(self, task: str) -> int:
        """Returns the number of a task; raises InputError if there is none of that name."""
        if task not in self._number:
            raise InputError(f"there is no task {task!r:.99}{did_you_mean(task, self._number)}")
        return self._number[task]


def _folders_in(folder: Path) -> dict[str, Path]:
    """Returns the folders of the task bundles in `folder`, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/task.json"))}


def _load(folder: Path, encoder: Bundle) -> Bundle:
    """Returns the task bundle in `folder`; raises InputError if it is another encoder's."""
    task = bundle.load(folder, "task", "--task")
    theirs, ours = task.info["encoder_sha256"], encoder.info["tensors_sha256"]
    if theirs != ours:
        raise InputError(
            f"--task={folder} belongs to another encoder (SHA-256 {theirs:.12}) than --encoder "
            f"({ours:.12}): name the encoder that it was trained on"
        )
    for name, shape in _shapes(task).items():
        held = task.tensors.get(name)
        if held is None or held.shape != shape:
            raise InputError(
                f"--task={folder} needs a tensor {name!r} of shape {shape}; it has "
                f"{'none' if held is None else held.shape}"
            )
    return task


def _shapes(task: Bundle) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a task's tensors."""
    model = task.info["model"]
    units, outputs = model["units"], 1 if model["num_classes"] == 2 else model["num_classes"]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(model["num_layers"]):
        shapes |= {f"initial_state/{layer}/{part}": (units,) for part in "hc"}
        if "lstm/0/bias" in task.tensors:
            shapes[f"lstm/{layer}/bias"] = (4 * units,)
    width = POOLED_VECTORS[model["pooling"]] * units
    if model["hidden_units"]:
        shapes |= {"hidden/kernel": (width, model["hidden_units"])}
        width = model["hidden_units"]
        shapes |= {"hidden/bias": (width,)}
    return shapes | {"output/kernel": (width, outputs), "output/bias": (outputs,)}


def _shared(tasks: Mapping[str, Bundle], size: str) -> Any:
    """Returns a size of the head that all tasks share; raises InputError if they do not."""
    by_value: dict[Any, str] = {}
    for name, task in tasks.items():
        by_value.setdefault(task.info["model"][size], name)
    if len(by_value) != 1:
        found = ", ".join(f"{value} (task {name!r})" for value, name in by_value.items())
        raise InputError(f"tasks of one bank must have one --{size}; found {found or 'no task'}")
    return next(iter(by_value))


def _of_lstms(
    encoder: Bundle, tasks: Sequence[Bundle]
) -> tuple[list[list[tf.Tensor]], list[tf.Tensor]]:
    """Returns for each layer h and c, each [tasks, units], and the biases [tasks, 4 * units].

    There are no biases if no task has its own, which costs nothing then.
    """
    layers = range(encoder.info["model"]["num_layers"])
    names = [[f"initial_state/{layer}/{part}" for part in "hc"] for layer in layers]
    states = [[tf.stack([task.tensors[name] for task in tasks]) for name in pair] for pair in names]
    if not any("lstm/0/bias" in task.tensors for task in tasks):
        return states, []
    biases = [
        tf.stack([{**encoder.tensors, **task.tensors}[f"lstm/{layer}/bias"] for task in tasks])
        for layer in layers
    ]
    return states, biases


def _of_heads(hidden_units: int, tasks: Sequence[Bundle]) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Returns each layer's kernels [tasks, inputs, outputs] and biases [tasks, outputs].

    The last layer has as many outputs as the task with the most classes.
    """
    most = max(task.info["model"]["num_classes"] for task in tasks)
    kernels, biases = [], []
    for task in tasks:
        kernel, bias = task.tensors["output/kernel"], task.tensors["output/bias"]
        if task.info["model"]["num_classes"] == 2:  # the softmax of both is the logit's sigmoid
            kernel, bias = (np.concatenate([-x, x], axis=-1) / 2 for x in (kernel, bias))
        missing = most - len(bias)
        kernels.append(np.pad(kernel, ((0, 0), (0, missing))))
        biases.append(np.pad(bias, (0, missing), constant_values=-np.inf))
    output = (tf.stack(kernels), tf.stack(biases))
    if not hidden_units:
        return [output]
    hidden = [
        tf.stack([task.tensors[f"hidden/{part}"] for task in tasks]) for part in ("kernel", "bias")
    ]
    return [(hidden[0], hidden[1]), output]
