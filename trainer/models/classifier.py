"""The supervised LSTM: encoder, small ReLU layer, and a logit per class (one for two classes).

With `multi_label` a document has any number of the classes: each logit is that of one of them.

The head is that of Miyato et al. 2017, section 4.1: 30 ReLU units between the LSTM's last output
and the logit. With pooling "concat" it also reads the mean and the maximum of all outputs (Howard &
Ruder 2018, section 3.3); with "mean" it reads the mean alone. Without hidden units the logits are
linear in what it reads.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer.models.context_state import UNKNOWN, ContextState
from trainer.models.encoder import Encoder, States, dropout
from trainer.models.lstm import Words

# Kind of pooling -> number of vectors of the LSTM's size that the head reads.
POOLED_VECTORS = {"last": 1, "mean": 1, "concat": 3}
# Kind of pooling -> number of vectors of outputs that reading in pieces carries on: sum, maximum.
_CARRIED_VECTORS = {"last": 0, "mean": 1, "concat": 2}


class Classifier(keras.layers.Layer):
    """A document classifier whose LSTM may start from a learned state.

    Attributes:
        encoder: The trained LSTMs.
        reader: None, or a frozen encoder that reads the document first; the trained LSTMs then
            start from its final states (`--initial_state=encode`).
        pooling: Input of the head: "last", the last output; "mean", the mean of all outputs; or
            "concat", the last output and the mean and maximum of all.
        multi_label: Whether a document has a set of classes, each with a probability, and not one.
        contexts: For each LSTM a table of what a document's context, such as its author, adds to
            the initial state; empty without contexts.
        hidden: The ReLU layer of the head; None without hidden units.
        backward: None, or a classifier that reads the words in reverse order; the logits are then
            the mean of both (Miyato et al. 2017, section 4.1).
    """

    built: bool  # Keras's own

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        hidden_units: int = 30,
        reader: Encoder | None = None,
        pooling: str = "last",
        backward: "Classifier | None" = None,
        num_contexts: int = 0,
        multi_label: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.reader = reader
        self.pooling = pooling
        self.backward = backward
        self.num_classes, self.multi_label = num_classes, multi_label
        self.num_contexts = num_contexts
        layers = range(encoder.num_layers if num_contexts else 0)
        self.contexts = [ContextState(encoder.units, ids=num_contexts) for _ in layers]
        seed = encoder.seed
        self.hidden = None
        if hidden_units:
            self.hidden = keras.layers.Dense(
                hidden_units,
                activation="relu",
                kernel_initializer=keras.initializers.GlorotUniform(seed=seed + 4),
                name="hidden",
            )
        self.output_layer = keras.layers.Dense(
            num_outputs(num_classes, multi_label),
            kernel_initializer=keras.initializers.GlorotUniform(seed=seed + 5),
            name="output",
        )

    def build(self, input_shape: tuple[int | None, ...] | None = None) -> None:
        """Creates the weights, which do not depend on the shape of the tokens."""
        for encoder in (self.encoder, self.reader):
            if encoder is not None and not encoder.built:
                encoder.build()
        width = POOLED_VECTORS[self.pooling] * self.encoder.units
        if self.hidden is not None:
            self.hidden.build((None, width))
            width = self.hidden.units
        self.output_layer.build((None, width))
        for table in self.contexts:
            table.build((None,))
        if self.reader is not None:
            self.reader.trainable = False
        if self.backward is not None and not self.backward.built:
            self.backward.build()
        self.built = True

    def logits(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        training: bool,
        contexts: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Returns float32 [batch, 1] for two classes, else [batch, num_classes]; no dropout.

        Args:
            tokens: int32 [batch, time], right-padded.
            lengths: int32 [batch].
            training: Whether a gradient will be taken.
            contexts: See `start`.
        """
        read = (self.embed if training else self.words)(tokens, lengths)
        return self.read(read, lengths, self.start(tokens, lengths, contexts), training)

    def class_logits(self, logits: tf.Tensor) -> tf.Tensor:
        """Returns a logit for each class, also if there are two: float32 [batch, num_classes]."""
        if logits.shape[-1] == self.num_classes:
            return logits
        return tf.concat([-logits / 2, logits / 2], axis=1)  # their softmax is the sigmoid

    def probabilities(self, class_logits: tf.Tensor) -> tf.Tensor:
        """Returns the probability of each class, from `class_logits`."""
        return tf.sigmoid(class_logits) if self.multi_label else tf.nn.softmax(class_logits)

    # No property: Keras saves what every attribute leads to, and this one leads to itself.
    def directions(self) -> list["Classifier"]:
        """This classifier, and `backward` if there is one."""
        return [self] if self.backward is None else [self, self.backward]

    def embed(
        self,
        tokens: tf.Tensor,
        lengths: tf.Tensor,
        dropout_rate: float = 0.0,
        embedding_seed: tf.Tensor | None = None,
    ) -> list[tf.Tensor]:
        """Returns each direction's embeddings, [batch, time, embedding_dim]: this, then `backward`.

        Args:
            tokens, lengths: As for `logits`.
            dropout_rate: For the embeddings.
            embedding_seed: int32 [2], needed if dropout_rate is not 0.
        """
        embedded = [dropout(self.encoder.embed(tokens), dropout_rate, embedding_seed)]
        if self.backward is None:
            return embedded
        seed = of_backward(embedding_seed)
        return embedded + self.backward.embed(
            reversed_words(tokens, lengths), lengths, dropout_rate, seed
        )

    def head_inputs(
        self, tokens: tf.Tensor, lengths: tf.Tensor, contexts: tf.Tensor | None = None
    ) -> list[tf.Tensor]:
        """Returns what the head of each direction reads, without training: this, then `backward`.

        Arguments as for `logits`.
        """
        mask = tf.sequence_mask(lengths, tf.shape(tokens)[1])
        start, found = self.start(tokens, lengths, contexts), []
        both = zip(self.directions(), self.words(tokens, lengths), start, strict=True)
        for direction, words, states in both:
            outputs, final = direction.encoder.read(words, mask, states, training=False)
            found.append(pooled(self.pooling, outputs, final[-1][0], mask))
        return found

    def words(self, tokens: tf.Tensor, lengths: tf.Tensor) -> list[Words]:
        """Returns each direction's words, none dropped: this, then `backward`."""
        words = [self.encoder.words(tokens)]
        if self.backward is None:
            return words
        return words + self.backward.words(reversed_words(tokens, lengths), lengths)

    def start(
        self, tokens: tf.Tensor, lengths: tf.Tensor, contexts: tf.Tensor | None = None
    ) -> list[States]:
        """Returns the states that each direction's LSTMs start from for these documents.

        Args:
            tokens, lengths: As for `logits`.
            contexts: int32 [batch], -1 for unknown ones; None if all are unknown.
        """
        if self.reader is None:
            states = self.encoder.start(tf.shape(tokens)[0])
        else:
            _, states = self.reader(tokens, lengths)
            states = tf.nest.map_structure(tf.stop_gradient, states)
        states = self.in_context(states, contexts)
        if self.backward is None:
            return [states]
        return [states, *self.backward.start(reversed_words(tokens, lengths), lengths, contexts)]

    def in_context(self, states: States, contexts: tf.Tensor | None) -> States:
        """Returns `states` and what the documents' contexts add to them."""
        if not self.num_contexts:
            return states
        if contexts is None:
            contexts = tf.fill(tf.shape(states[0][0])[:1], UNKNOWN)
        added = [table(contexts) for table in self.contexts]
        return tf.nest.map_structure(tf.add, states, added)

    def read(
        self,
        embedded: list[tf.Tensor] | list[Words],
        lengths: tf.Tensor,
        start: list[States],
        training: bool,
        dropout_rate: float = 0.0,
        output_seed: tf.Tensor | None = None,
        every_step: bool = False,
    ) -> tf.Tensor:
        """Returns the logits of embedded documents.

        Args:
            embedded: From `embed` or `words`.
            start: From `start`.
            lengths, training: As for `logits`.
            dropout_rate: For outputs between layers and inputs of the head.
            output_seed: int32 [2], needed if dropout_rate is not 0.
            every_step: Whether to predict after every word, with `pooling` "last". The logits are
                then [batch, time, ...]; those of step `lengths` - 1 equal the usual ones.
        """
        first = embedded[0]
        steps = tf.shape(first.index if isinstance(first, Words) else first)[1]
        mask = tf.sequence_mask(lengths, steps)
        outputs, states = self.encoder.read(
            embedded[0], mask, start[0], training, dropout_rate, output_seed
        )
        last_h, _ = states[-1]
        read = outputs if every_step else pooled(self.pooling, outputs, last_h, mask)
        logits = self._head(dropout(read, dropout_rate, output_seed))
        if self.backward is None:
            return logits
        others = self.backward.read(
            embedded[1:],
            lengths,
            start[1:],
            training,
            dropout_rate,
            of_backward(output_seed),
            every_step,
        )
        return (logits + others) / 2

    def _head(self, read: tf.Tensor) -> tf.Tensor:
        return self.output_layer(read if self.hidden is None else self.hidden(read))

    def unread(self, contexts: tf.Tensor) -> tf.Tensor:
        """Returns what `read_on` carries on before the first token: [batch, vectors, units].

        Args:
            contexts: int32 [batch], -1 for unknown ones.
        """
        contexts = tf.convert_to_tensor(contexts, tf.int32)
        states = self.in_context(self.encoder.start(tf.size(contexts)), contexts)
        state = [part for pair in states for part in pair]
        outputs = [tf.zeros_like(state[0]), tf.fill(tf.shape(state[0]), state[0].dtype.min)]
        return tf.stack([*state, *outputs[: _CARRIED_VECTORS[self.pooling]]], axis=1)

    def read_on(self, carried: tf.Tensor, tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Returns what is carried on after more tokens of each document; see `inference.sessions`.

        Args:
            carried: float32 [batch, vectors, units]: h and c of each layer, and of the outputs so
                far the sum (pooling "mean" and "concat") and the maximum ("concat").
            tokens, lengths: As for `logits`; a length may be 0.
        """
        vectors = tf.unstack(carried, axis=1)
        layers = 2 * len(self.encoder.lstms)
        states = [vectors[i : i + 2] for i in range(0, layers, 2)]
        mask = tf.sequence_mask(lengths, tf.shape(tokens)[1])
        words = self.encoder.words(tokens)
        outputs, final = self.encoder.read(words, mask, states, training=False)
        new = [part for pair in final for part in pair]
        read = mask[:, :, None]
        if self.pooling != "last":
            shown = tf.where(read, outputs, tf.zeros_like(outputs))
            new.append(vectors[layers] + tf.reduce_sum(shown, axis=1))
        if self.pooling == "concat":
            shown = tf.where(read, outputs, outputs.dtype.min)
            new.append(tf.maximum(vectors[layers + 1], tf.reduce_max(shown, axis=1)))
        return tf.stack(new, axis=1)

    def logits_of_carried(self, carried: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        """Returns the logits after what `read_on` has read; the end token must be part of it.

        Args:
            carried: From `read_on`.
            counts: float32 [batch], the number of tokens read.
        """
        vectors = tf.unstack(carried, axis=1)
        layers = 2 * len(self.encoder.lstms)
        last = vectors[layers - 2]
        if self.pooling == "last":
            return self._head(last)
        mean = vectors[layers] / counts[:, None]
        if self.pooling == "mean":
            return self._head(mean)
        return self._head(tf.concat([last, mean, vectors[layers + 1]], axis=1))


def reversed_words(tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """Returns each row's words in reverse order, the end token last: int32 [batch, time]."""
    return tf.reverse_sequence(tokens, tf.maximum(lengths - 1, 0), seq_axis=1)


def of_backward(seed: tf.Tensor | None) -> tf.Tensor | None:
    """Returns another seed, for the draws of `backward`."""
    return None if seed is None else tf.random.experimental.stateless_fold_in(seed, 1)


def pooled(pooling: str, outputs: tf.Tensor, last: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns what the head reads: [batch, vectors * units].

    Args:
        pooling: A key of POOLED_VECTORS.
        outputs: [batch, time, units].
        last: [batch, units].
        mask: bool [batch, time], True at least once in each row unless `pooling` is "last";
            outputs where it is False are ignored.
    """
    if pooling == "last":
        return last
    share = tf.cast(mask, outputs.dtype)
    share /= tf.reduce_sum(share, axis=1, keepdims=True)  # [batch, time]
    mean = tf.linalg.matvec(outputs, share, transpose_a=True)
    if pooling == "mean":
        return mean
    return tf.concat([last, mean, _maximum(outputs, mask)], axis=1)


@tf.custom_gradient
def _maximum(outputs: tf.Tensor, mask: tf.Tensor) -> Any:
    """Returns the largest output of each cell where the mask is True: [batch, units].

    TensorFlow's gradient passes over [batch, time, units] three times as often.
    """
    shown = tf.where(mask[:, :, None], outputs, outputs.dtype.min)
    largest = tf.reduce_max(shown, axis=1, keepdims=True)

    def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, None]:
        is_largest = tf.cast(tf.equal(shown, largest), upstream.dtype)
        each = upstream[:, None] / tf.reduce_sum(is_largest, axis=1, keepdims=True)
        return is_largest * each, None

    return largest[:, 0], gradient


def num_outputs(num_classes: int, multi_label: bool = False) -> int:
    """Returns the number of logits of a classifier."""
    return 1 if num_classes == 2 and not multi_label else num_classes


def targets(labels: tf.Tensor, label_sets: np.ndarray | None) -> tf.Tensor:
    """Returns what `losses_and_errors` takes: the labels, or their sets, float32 [batch, classes].

    Args:
        labels: int32 [batch], as the store has them, at least 0.
        label_sets: Of the store; None if documents have one label each.
    """
    if label_sets is None:
        return labels
    return tf.cast(tf.gather(tf.constant(label_sets), labels), tf.float32)


def losses_and_errors(
    logits: tf.Tensor,
    labels: tf.Tensor,
    smoothing: float = 0.0,
    positive_weights: np.ndarray | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the cross-entropy in nats and 1.0 where the label is wrong: float32 [batch] each.

    For sets of labels, they are the sum of all classes' cross-entropies, and 1.0 unless each class
    is right.

    Args:
        logits: As `Classifier.logits` returns them, or those of every step.
        labels: int32 [batch], or [batch, time]. Sets have one more axis, float32 [..., classes].
        smoothing: Share of the label spread over all classes (Szegedy et al. 2016, section 7).
        positive_weights: Of sets, a factor on the loss of each class that a document has.
    """
    if labels.dtype == tf.float32:
        weights = 1.0 if positive_weights is None else positive_weights
        truth = labels * (1 - smoothing) + smoothing / 2
        losses = tf.nn.weighted_cross_entropy_with_logits(truth, logits, weights)
        wrong = (logits > 0) != (labels > 0)
        return tf.reduce_sum(losses, -1), tf.cast(tf.reduce_any(wrong, -1), tf.float32)
    if logits.shape[-1] == 1:
        logit = logits[..., 0]
        truth = tf.cast(labels, logit.dtype) * (1 - smoothing) + smoothing / 2
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=truth, logits=logit)
        predicted = tf.cast(logit > 0, tf.int32)
    else:
        classes = logits.shape[-1]
        truth = tf.one_hot(labels, classes, dtype=logits.dtype)
        truth = truth * (1 - smoothing) + smoothing / classes
        losses = tf.nn.softmax_cross_entropy_with_logits(truth, logits)
        predicted = tf.argmax(logits, axis=-1, output_type=tf.int32)
    return losses, tf.cast(predicted != labels, tf.float32)
