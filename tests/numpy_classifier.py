"""A tiny classifier and the same one in NumPy, for references of what fine-tuning minimises."""

from collections.abc import Callable

import numpy as np

from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder, Initial

VOCAB_SIZE, DIM, UNITS = 12, 3, 4
TOKENS = np.array([[5, 9, 2, 0, 0], [7, 7, 8, 3, 2], [4, 11, 6, 2, 0], [2, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([3, 5, 4, 1], np.int32)
LABELS = np.array([1, 0, -1, 1], np.int32)
WEIGHTS = np.array([1, 1, 1, 0], np.float32)  # the last row is filler


def make(num_classes: int, precision: str = "float32") -> Classifier:
    """Returns a classifier that reads normalised embeddings and starts from a state."""
    encoder = Encoder(
        VOCAB_SIZE,
        DIM,
        UNITS,
        1,
        initial=Initial(embedding_scale=1),
        normalised=True,
        precision=precision,
    )
    classifier = Classifier(encoder, num_classes, hidden_units=5)
    classifier.build()
    random = np.random.default_rng(0)
    encoder.frequencies.assign(random.dirichlet(np.ones(VOCAB_SIZE)))
    classifier.hidden.bias.assign(random.normal(size=5))
    for variable in encoder.initial_states[0]:
        variable.assign(random.normal(size=UNITS))
    return classifier


class Reference:
    """The classifier in NumPy, float64.

    Attributes:
      variables: the classifier's, by name.
      values: what they hold, which may be changed.
    """

    def __init__(self, classifier: Classifier):
        encoder, cell = classifier.encoder, classifier.encoder.lstms[0].cell
        variables = {
            "table": encoder.embeddings,
            "frequencies": encoder.frequencies,
            "kernel": cell.kernel,
            "recurrent": cell.recurrent_kernel,
            "bias": cell.bias,
            "h": encoder.initial_states[0][0],
            "c": encoder.initial_states[0][1],
            "hidden": classifier.hidden.kernel,
            "hidden_bias": classifier.hidden.bias,
            "output": classifier.output_layer.kernel,
            "output_bias": classifier.output_layer.bias,
        }
        self.variables = variables
        self.values = {name: v.numpy().astype(np.float64) for name, v in variables.items()}

    def embed(self) -> np.ndarray:
        """Returns the embeddings of TOKENS: [batch, time, dim]."""
        table, weights = self.values["table"], self.values["frequencies"][:, None]
        mean = (weights * table).sum(0)
        deviation = np.sqrt((weights * (table - mean) ** 2).sum(0) + 1e-6)
        return ((table - mean) / deviation)[TOKENS]

    def read(
        self, words: np.ndarray, state: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Returns the LSTM's outputs after each of `words`, [time, dim], and the state then."""
        v, outputs = self.values, []
        h, c = state or (v["h"], v["c"])
        for word in words:
            i, f, g, o = np.split(word @ v["kernel"] + h @ v["recurrent"] + v["bias"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            outputs.append(h)
        return outputs, (h, c)

    def log_probabilities(self, embedded: np.ndarray) -> np.ndarray:
        """Returns those of the classes: [batch, classes]."""
        v, found = self.values, []
        for row, length in zip(embedded, LENGTHS, strict=True):
            _, (h, _) = self.read(row[:length])
            hidden = np.maximum(h @ v["hidden"] + v["hidden_bias"], 0)
            logits = hidden @ v["output"] + v["output_bias"]
            logits = np.array([0, *logits]) if len(logits) == 1 else logits
            found.append(logits - np.log(np.exp(logits).sum()))
        return np.stack(found)

    def label_losses(self, embedded: np.ndarray) -> np.ndarray:
        """Returns the documents' losses, 0 without a label: [batch]."""
        picked = self.log_probabilities(embedded)[np.arange(4), np.maximum(LABELS, 0)]
        return -picked * WEIGHTS * (LABELS >= 0)

    def divergences(self, log_p: np.ndarray, embedded: np.ndarray) -> np.ndarray:
        """Returns the divergences of the predictions for `embedded` from `log_p`: [batch]."""
        return (np.exp(log_p) * (log_p - self.log_probabilities(embedded))).sum(1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def differences(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Returns the gradient of `function` by central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = 1e-5
        found[index] = (function(at + step) - function(at - step)) / 2e-5
    return found
