"""Reads batches of texts by the compiled loops alone: one operation a layer, and no graph.

Batches of a few short texts, which a server has, take a graph of the whole classifier longer than
their products do.
"""

from types import ModuleType

import numpy as np
import tensorflow as tf

from trainer import native
from trainer.models.classifier import Classifier, pooled
from trainer.models.encoder import States

TABLE_BYTES = 1 << 26


class CompiledReader:
    """A classifier whose weights do not change any more.

    What each word of the vocabulary gives the gates of the lowest LSTM is computed once, if that
    takes at most TABLE_BYTES; otherwise it is computed once a batch for each different word.
    """

    def __init__(self, classifier: Classifier, operations: ModuleType):
        self._classifier = classifier
        self._operations = operations
        cells = [lstm.cell for lstm in classifier.encoder.lstms]
        self._weights = [
            [tf.convert_to_tensor(v) for v in (cell.kernel, cell.recurrent_kernel, cell.bias)]
            for cell in cells
        ]
        head = (classifier.hidden, classifier.output_layer)
        self._head = [(d.kernel.numpy(), d.bias.numpy()) for d in head if d is not None]
        pairs = classifier.encoder.initial_states
        self._initial = [[part.numpy() for part in pair] for pair in pairs]
        self._no_mask = tf.zeros([0], tf.bool)
        self._no_index, self._no_bias = tf.zeros([0], tf.int32), tf.zeros([0])
        words, units = classifier.encoder.vocab_size, classifier.encoder.units
        self._table = None
        if words * units * 16 <= TABLE_BYTES:
            self._table = self._of_words(tf.range(words))

    def logits(self, tokens: np.ndarray, lengths: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        """Returns what `Classifier.logits` does, up to rounding; arguments as there."""
        z, index = self._table, tokens
        if z is None:
            distinct, places = np.unique(tokens, return_inverse=True)
            z, index = self._of_words(distinct), places.reshape(tokens.shape).astype(np.int32)
        mask = tf.constant(np.arange(tokens.shape[1]) < lengths[:, None])
        pooling, last = self._classifier.pooling, len(self._weights) - 1
        start = self._start(len(lengths), contexts)
        for layer, ((_, recurrent, _), (h, c)) in enumerate(zip(self._weights, start, strict=True)):
            outputs, final_h, *_ = self._operations.warmstate_lstm(
                z,
                index,
                recurrent,
                h,
                c,
                mask,
                self._no_bias,
                factors=tf.float32,
                keep=False,
                return_sequences=layer < last or pooling != "last",
            )
            if layer < last:
                z, index = self._product(outputs, layer + 1, mask), self._no_index
        read = pooled(pooling, outputs, final_h, mask).numpy()
        for place, (kernel, bias) in enumerate(self._head):
            read = (np.maximum(read, 0) if place else read) @ kernel + bias
        return read

    def _of_words(self, words: tf.Tensor | np.ndarray) -> tf.Tensor:
        """Returns what words [words] give the lowest LSTM's gates: [words, 4 * units]."""
        embedded = self._classifier.encoder.embed(words)
        return self._product(embedded[tf.newaxis], 0, self._no_mask)[0]

    def _product(self, inputs: tf.Tensor, layer: int, mask: tf.Tensor) -> tf.Tensor:
        kernel, _, bias = self._weights[layer]
        return self._operations.warmstate_product(inputs, kernel, bias, mask, transpose=False)

    def _start(self, batch: int, contexts: np.ndarray) -> States:
        """Returns the initial states of a batch."""
        if self._classifier.num_contexts:
            states = self._classifier.encoder.start(batch)
            return self._classifier.in_context(states, tf.constant(contexts))
        shape = (batch, self._classifier.encoder.units)
        return [[np.broadcast_to(part, shape) for part in pair] for pair in self._initial]


def compiled_reader(classifier: Classifier) -> CompiledReader | None:
    """Returns a reader, or None where the compiled loops are not used or lack what it needs."""
    operations = native.operations(training=False)
    whole = classifier.backward is None and classifier.reader is None
    if operations and whole and all(lstm.fits_compiled() for lstm in classifier.encoder.lstms):
        return CompiledReader(classifier, operations)
    return None
