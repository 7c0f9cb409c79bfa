"""Reads batches of texts by the compiled loops alone: one operation a layer, and no graph.

Batches of a few short texts, which a server has, take a graph of the whole classifier longer than
their products do.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import tensorflow as tf

from trainer import native
from trainer.models.classifier import Classifier
from trainer.models.context_state import UNKNOWN

TABLE_BYTES = 1 << 26


class CompiledReader:
    """A classifier whose weights do not change any more.

    What each word of the vocabulary gives the gates of the lowest LSTM is computed once, if that
    takes at most TABLE_BYTES; otherwise it is computed once a batch for each different word.
    """

    def __init__(self, classifier: Classifier, operations: ModuleType):
        self._classifier = classifier
        self._operations = operations
        encoder, pack = classifier.encoder, operations.warmstate_pack
        cells = [lstm.cell for lstm in encoder.lstms]
        kernels = [tf.convert_to_tensor(cell.kernel) for cell in cells]
        self._recurrent = [pack(cell.recurrent_kernel, of_gates=True) for cell in cells]
        self._biases = [tf.convert_to_tensor(cell.bias) for cell in cells]
        if encoder.normalised:  # the lowest LSTM takes plain embeddings
            _, deviation = encoder.fixed_moments or encoder.moments()
            kernels[0] /= tf.convert_to_tensor(deviation)[:, tf.newaxis]
            self._biases[0] = tf.constant(encoder.biases()[0])
        self._kernels = [pack(kernel, of_gates=False) for kernel in kernels]
        self._embeddings = np.asarray(memoryview(tf.convert_to_tensor(encoder.embeddings)))
        head = (classifier.hidden, classifier.output_layer)
        self._head = [(d.kernel.numpy(), d.bias.numpy()) for d in head if d is not None]
        self._unread = classifier.unread([UNKNOWN]).numpy()
        self._no_mask = tf.zeros([0], tf.bool)
        self._no_index, self._no_bias = tf.zeros([0], tf.int32), tf.zeros([0])
        self._table = None
        if encoder.vocab_size * encoder.units * 16 <= TABLE_BYTES:
            self._table = self._of_words(np.arange(encoder.vocab_size))

    def probabilities(
        self, tokens: np.ndarray, lengths: np.ndarray, contexts: np.ndarray
    ) -> np.ndarray:
        """Returns the probability of each class; arguments as for `Classifier.logits`."""
        if self._classifier.num_contexts:
            carried = self._classifier.unread(contexts).numpy()
        else:
            carried = np.repeat(self._unread, len(lengths), axis=0)
        (carried,) = self.read_on(carried, [(tokens, lengths)])
        return self.probabilities_of_carried(carried, lengths)

    def read_on(
        self, carried: np.ndarray, pieces: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[np.ndarray]:
        """Returns what is carried on after each piece; see `Classifier.read_on`.

        Args:
            carried: Before the first piece.
            pieces: Tokens and lengths of each.
        """
        z, indices = self._table, [tokens for tokens, _ in pieces]
        if z is None:
            distinct, places = np.unique(
                np.concatenate([tokens.ravel() for tokens in indices]), return_inverse=True
            )
            z = self._of_words(distinct)
            ends = np.cumsum([tokens.size for tokens in indices])
            of_pieces = np.split(places.astype(np.int32), ends[:-1])
            indices = [p.reshape(t.shape) for p, t in zip(of_pieces, indices, strict=True)]
        found = []
        for index, (_, lengths) in zip(indices, pieces, strict=True):
            carried = self._read_piece(carried, z, index, lengths)
            found.append(carried)
        return found

    def _read_piece(
        self, carried: np.ndarray, z: tf.Tensor, index: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Returns what is carried on after a piece whose words are rows `index` of `z`."""
        mask = np.arange(index.shape[1]) < lengths[:, None]
        pools, last = self._classifier.pooling != "last", len(self._kernels) - 1
        after, outputs = carried.copy(), tf.constant(0.0)
        for layer, recurrent in enumerate(self._recurrent):
            outputs, after[:, 2 * layer], after[:, 2 * layer + 1], *_ = (
                self._operations.warmstate_lstm(
                    z,
                    index,
                    recurrent,
                    carried[:, 2 * layer],
                    carried[:, 2 * layer + 1],
                    mask,
                    self._no_bias,
                    keep=False,
                    return_sequences=layer < last or pools,
                )
            )
            if layer < last:
                z, index = self._product(outputs, layer + 1, mask), self._no_index
        if pools:
            add_outputs(after[:, 2 * last + 2 :], outputs.numpy(), lengths)
        return after

    def probabilities_of_carried(self, carried: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the probability of each class; see `Classifier.logits_of_carried`."""
        last = 2 * len(self._kernels) - 2
        found = {"last": carried[:, last]}
        if self._classifier.pooling != "last":
            found["mean"] = carried[:, last + 2] / counts[:, None].astype(np.float32)
        if self._classifier.pooling == "concat":
            found["concat"] = np.concatenate([*found.values(), carried[:, last + 3]], axis=1)
        read = found[self._classifier.pooling]
        for place, (kernel, bias) in enumerate(self._head):
            read = (np.maximum(read, 0) if place else read) @ kernel + bias
        return self._probabilities_of(read)

    def _probabilities_of(self, logits: np.ndarray) -> np.ndarray:
        """Returns what `Classifier.class_logits` and then `probabilities` do."""
        if self._classifier.multi_label:
            return (1 + np.tanh(logits / 2)) / 2
        if logits.shape[1] != self._classifier.num_classes:
            logits = np.concatenate([-logits / 2, logits / 2], axis=1)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def _of_words(self, words: np.ndarray) -> tf.Tensor:
        """Returns what words [words] give the lowest LSTM's gates: [words, 4 * units]."""
        found = self._product(self._embeddings[words][np.newaxis], 0, self._no_mask)
        return tf.squeeze(found, 0)

    def _product(
        self, inputs: tf.Tensor | np.ndarray, layer: int, mask: tf.Tensor | np.ndarray
    ) -> tf.Tensor:
        return self._operations.warmstate_product(
            inputs, self._kernels[layer], self._biases[layer], mask, transpose=False
        )


def add_outputs(pools: np.ndarray, outputs: np.ndarray, lengths: np.ndarray) -> None:
    """Adds the LSTM's outputs to their sum so far, and to their maximum if there is one.

    Args:
        pools: [batch, 1 or 2, units]; changed in place.
        outputs: [batch, time, units].
        lengths: [batch], of each row's outputs that count.
    """
    for pool, of_row, length in zip(pools, outputs, lengths, strict=True):
        pool[0] += of_row[:length].sum(axis=0)
        if len(pool) > 1 and length:
            np.maximum(pool[1], of_row[:length].max(axis=0), out=pool[1])


def compiled_reader(classifier: Classifier) -> CompiledReader | None:
    """Returns a reader, or None where the compiled loops are not used or lack what it needs."""
    operations = native.operations(training=False)
    whole = classifier.backward is None and classifier.reader is None
    if operations and whole and all(lstm.fits_compiled() for lstm in classifier.encoder.lstms):
        return CompiledReader(classifier, operations)
    return None
