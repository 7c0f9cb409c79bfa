"""Adversarial and virtual adversarial training on word embeddings (Miyato, Dai & Goodfellow 2017).

A document's embeddings are perturbed, within a ball, in the direction that the model handles worst:
in which the label's loss grows fastest (adversarial, equation 5), or the prediction changes most
(virtual adversarial, equations 6 to 8), which needs no label. The loss of the perturbed document is
added to the usual one. No gradient passes through the perturbation.

The norm is of a whole document, over all of its words. The end token and the padding are never
perturbed. The embeddings should be normalised, or training could enlarge them until the
perturbation is negligible.
"""

from collections.abc import Callable

import tensorflow as tf

# Norm of the random start of the power iteration.
XI = 0.1


def perturbed_words(lengths: tf.Tensor, time: int | tf.Tensor) -> tf.Tensor:
    """Returns bool [batch, time]: True at words, False at the end token and at padding."""
    return tf.sequence_mask(lengths - 1, time)


def of_norm(direction: tf.Tensor, perturbed: tf.Tensor, norm: float) -> tf.Tensor:
    """Returns each document's `direction`, 0 at words not to perturb, scaled to the L2 norm `norm`.

    Zero and non-finite directions map to zero; a gradient may overflow in half precision.

    Args:
        direction: [batch, time, dim].
        perturbed: bool [batch, time].
    """
    counted = perturbed[:, :, None] & tf.math.is_finite(direction)
    direction = tf.where(counted, direction, tf.zeros_like(direction))
    # By its largest element first: the square of a small gradient is 0 in float32.
    largest = tf.reduce_max(tf.abs(direction), axis=(1, 2), keepdims=True)
    direction = tf.math.divide_no_nan(direction, largest)
    length = tf.sqrt(tf.reduce_sum(tf.square(direction), axis=(1, 2), keepdims=True))
    return norm * tf.math.divide_no_nan(direction, length)


def random_direction(embedded: tf.Tensor, tokens: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns normal noise of the shape of `embedded`: [batch, time, dim].

    A document's noise is a function of the seed and its tokens, not of its place in the batch, so
    that it does not depend on the number of workers.

    Args:
        tokens: int32 [batch, time].
        seed: int32 [2].
    """
    factors = 2 * tf.range(tf.shape(tokens)[1]) + 1
    checksums = tf.reduce_sum(tokens * factors, axis=1)  # int32, which wraps around
    seeds = tf.stack([tf.fill(tf.shape(checksums), seed[0]), seed[1] + checksums], axis=1)
    shape = tf.shape(embedded)[1:]
    noise = tf.map_fn(
        lambda own: tf.random.stateless_normal(shape, own, dtype=embedded.dtype),
        tf.pad(seeds, [[0, 1], [0, 0]]),  # one more row: map_fn fails on zero rows of unknown time
        fn_output_signature=tf.TensorSpec(embedded.shape[1:], embedded.dtype),
    )
    return noise[:-1]


def divergence(logits: tf.Tensor, others: tf.Tensor, multi_label: bool = False) -> tf.Tensor:
    """Returns the Kullback-Leibler divergence of two predictions, in nats: [batch].

    Args:
        logits, others: Both predictions', [batch, classes], or [batch, 1] for two classes.
        multi_label: Whether each class has a probability; the divergence is then their sum.
    """
    if multi_label or logits.shape[-1] == 1:
        cross_entropy = tf.nn.sigmoid_cross_entropy_with_logits
        truth = tf.sigmoid(logits)
        return tf.reduce_sum(cross_entropy(truth, others) - cross_entropy(truth, logits), axis=1)
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits
    truth = tf.nn.softmax(logits)
    return cross_entropy(truth, others) - cross_entropy(truth, logits)


def adversarial_perturbation(
    loss_of: Callable[[tf.Tensor], tf.Tensor],
    logits: tf.Tensor,
    tape: tf.GradientTape,
    embedded: list[tf.Tensor],
    lengths: tf.Tensor,
    norm: float,
    rescaled: bool = True,
) -> list[tf.Tensor]:
    """Returns the perturbations in whose direction a loss grows fastest, shaped as `embedded`.

    Only the direction of a document's gradient counts. At the loss's scale a sure document's
    gradient could underflow in float16, so the backward pass may have another one. Without, it
    is the one that also gives the loss's gradients, and a graph runs it once.

    Args:
        loss_of: Maps logits to the sum of the documents' losses.
        logits: What the model gives for `embedded`, [batch, ...].
        tape: Recorded `logits`, and watches `embedded`.
        embedded: Each [batch, time, dim].
        lengths: int32 [batch].
        rescaled: Whether the backward pass has a separate scale for each document.
    """
    perturbed = perturbed_words(lengths, tf.shape(embedded[0])[1])
    with tf.GradientTape(watch_accessed_variables=False) as head:
        head.watch(logits)
        loss = loss_of(logits)
    by_logits = head.gradient(loss, logits)
    if rescaled:
        axes = list(range(1, logits.shape.rank))
        largest = tf.reduce_max(tf.abs(by_logits), axis=axes, keepdims=True)
        by_logits = tf.math.divide_no_nan(by_logits, largest)
    gradients = tape.gradient(logits, embedded, output_gradients=by_logits)
    return [tf.stop_gradient(of_norm(gradient, perturbed, norm)) for gradient in gradients]


def virtual_adversarial_perturbation(
    logits: tf.Tensor,
    logits_of: Callable[[list[tf.Tensor]], tf.Tensor],
    embedded: list[tf.Tensor],
    directions: list[tf.Tensor],
    lengths: tf.Tensor,
    norm: float,
    multi_label: bool = False,
) -> list[tf.Tensor]:
    """Returns the perturbations that change the prediction most, shaped as `embedded`.

    One power iteration, from a random direction: the divergence is quadratic near 0, so that its
    gradient at a small perturbation is the Hessian times that perturbation.

    Args:
        logits: What the model gives for `embedded`.
        logits_of: Maps embeddings to logits.
        embedded: Each [batch, time, dim].
        directions: The random starts, shaped as `embedded`.
        lengths: int32 [batch].
        multi_label: See `divergence`.
    """
    perturbed = perturbed_words(lengths, tf.shape(embedded[0])[1])
    logits = tf.stop_gradient(logits)
    perturbations = [of_norm(direction, perturbed, XI) for direction in directions]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(perturbations)
        pairs = zip(embedded, perturbations, strict=True)
        changed = logits_of([tf.stop_gradient(e) + perturbation for e, perturbation in pairs])

    def change(others: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(divergence(logits, others, multi_label))

    return adversarial_perturbation(change, changed, tape, perturbations, lengths, norm)
