"""Adversarial and virtual adversarial training on word embeddings (Miyato, Dai & Goodfellow 2017).

A document is moved, within a ball around its embeddings, to where the model does worst: where the
label's loss grows fastest (adversarial, equation 5), or where the prediction changes most (virtual
adversarial, equations 6 to 8), which needs no label. The loss there is added to the usual one. No
gradient goes through the move itself.

The norm is one document's, over all of its words together. The end token and the padding are never
moved. The embeddings should be normalised, or training could make the move small beside them.
"""

from collections.abc import Callable

import tensorflow as tf

# The norm of the random first guess of the direction in which the prediction changes most.
XI = 0.1


def movable_words(lengths: tf.Tensor, time: int | tf.Tensor) -> tf.Tensor:
    """Returns bool [batch, time]: True at the words, False at the end token and at padding."""
    return tf.sequence_mask(lengths - 1, time)


def of_norm(direction: tf.Tensor, movable: tf.Tensor, norm: float) -> tf.Tensor:
    """Returns each document's `direction`, 0 at what is not movable, scaled to the L2 norm `norm`.

    A direction that is 0 remains 0, and so does what is no number: a gradient that was too large
    for half precision.

    Args:
        direction: [batch, time, dim].
        movable: Bool [batch, time].
    """
    counted = movable[:, :, None] & tf.math.is_finite(direction)
    direction = tf.where(counted, direction, tf.zeros_like(direction))
    # By its largest element first: the square of a small gradient is 0 in float32.
    largest = tf.reduce_max(tf.abs(direction), axis=(1, 2), keepdims=True)
    direction = tf.math.divide_no_nan(direction, largest)
    length = tf.sqrt(tf.reduce_sum(tf.square(direction), axis=(1, 2), keepdims=True))
    return norm * tf.math.divide_no_nan(direction, length)


def random_direction(embedded: tf.Tensor, tokens: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns normal noise of the shape of `embedded`: [batch, time, dim].

    A document's is a function of the seed and of its own tokens, wherever in the batch it is: so
    that it does not depend on how many workers there are.

    Args:
        tokens: Int32 [batch, time].
        seed: Int32 [2].
    """
    factors = 2 * tf.range(tf.shape(tokens)[1]) + 1
    checksums = tf.reduce_sum(tokens * factors, axis=1)  # int32, which wraps around
    seeds = tf.stack([tf.fill(tf.shape(checksums), seed[0]), seed[1] + checksums], axis=1)
    shape = tf.shape(embedded)[1:]
    noise = tf.map_fn(
        lambda own: tf.random.stateless_normal(shape, own, dtype=embedded.dtype),
        tf.pad(seeds, [[0, 1], [0, 0]]),  # one more: it cannot map no rows, of unknown time
        fn_output_signature=tf.TensorSpec(embedded.shape[1:], embedded.dtype),
    )
    return noise[:-1]


def divergence(logits: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Returns the Kullback-Leibler divergence of two predictions, in nats: [batch].

    Args:
        logits, others: Of the first and the second prediction, [batch, classes], or [batch, 1] for
            two classes.
    """
    if logits.shape[-1] == 1:
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits
        truth, logit, other = tf.sigmoid(logits[:, 0]), logits[:, 0], others[:, 0]
        return cross_entropy(truth, other) - cross_entropy(truth, logit)
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits
    truth = tf.nn.softmax(logits)
    return cross_entropy(truth, others) - cross_entropy(truth, logits)


def adversarial_move(
    loss_of: Callable[[tf.Tensor], tf.Tensor],
    logits: tf.Tensor,
    tape: tf.GradientTape,
    embedded: list[tf.Tensor],
    lengths: tf.Tensor,
    norm: float,
) -> list[tf.Tensor]:
    """Returns how to move `embedded` so that a loss grows fastest: as `embedded`.

    Of a document's gradient only the direction counts. It goes through the LSTMs, which may be in
    half precision, at a size of its own, whatever the loss's: where the model is sure of a document
    its gradient would be 0 in float16, and the scale of the training loss says nothing of it.

    Args:
        loss_of: Logits -> the sum of the documents' losses.
        logits: Of `embedded`, [batch, ...].
        tape: On which they were computed, and which watches `embedded`.
        embedded: Each [batch, time, dim].
        lengths: Int32 [batch].
    """
    movable = movable_words(lengths, tf.shape(embedded[0])[1])
    with tf.GradientTape(watch_accessed_variables=False) as head:
        head.watch(logits)
        loss = loss_of(logits)
    by_logits = head.gradient(loss, logits)
    axes = list(range(1, logits.shape.rank))
    largest = tf.reduce_max(tf.abs(by_logits), axis=axes, keepdims=True)
    by_logits = tf.math.divide_no_nan(by_logits, largest)
    gradients = tape.gradient(logits, embedded, output_gradients=by_logits)
    return [tf.stop_gradient(of_norm(gradient, movable, norm)) for gradient in gradients]


def virtual_adversarial_move(
    logits: tf.Tensor,
    logits_of: Callable[[list[tf.Tensor]], tf.Tensor],
    embedded: list[tf.Tensor],
    directions: list[tf.Tensor],
    lengths: tf.Tensor,
    norm: float,
) -> list[tf.Tensor]:
    """Returns how to move `embedded` so that the prediction changes most: as `embedded`.

    One power iteration, from a random direction: the divergence is quadratic near 0, so that its
    gradient at a small move is the Hessian times that move.

    Args:
        logits: Of `embedded`.
        logits_of: Embedded -> logits.
        embedded: Each [batch, time, dim].
        directions: The first guesses, as `embedded`.
        lengths: Int32 [batch].
    """
    movable = movable_words(lengths, tf.shape(embedded[0])[1])
    logits = tf.stop_gradient(logits)
    moves = [of_norm(direction, movable, XI) for direction in directions]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(moves)
        moved = [tf.stop_gradient(e) + move for e, move in zip(embedded, moves, strict=True)]
        changed = logits_of(moved)

    def change(others: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(divergence(logits, others))

    return adversarial_move(change, changed, tape, moves, lengths, norm)
