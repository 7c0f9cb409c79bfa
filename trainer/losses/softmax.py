"""Cross-entropy over a large vocabulary: exact, and sampled for training.

The sampled softmax estimates the full one by importance sampling (Bengio & Senecal 2003; Jean et
al. 2015, section 3). The normaliser is the target's term plus those of a few random words, each
divided by its expected count among them. The target's term is exact, so the estimate is unbiased,
also if frequent words are drawn many times.
"""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from trainer.distribution.variables import lookup

# Logits in memory at a time: 64 MiB of float32.
CHUNK_LOGITS = 1 << 24
# The same for the sampled softmax: 2 MiB, which fits a cache.
CHUNK_SAMPLED_LOGITS = 1 << 19


def cross_entropy(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tf.Tensor:
    """Returns the exact cross-entropy, in nats: [tokens], of the type of `hidden`.

    Only CHUNK_LOGITS of [tokens, vocab_size] are in memory at a time, and the gradient recomputes
    them: four products of that size instead of three. Differentiable once.

    Args:
        hidden: [tokens, units].
        targets: int32 [tokens].
        kernel: [vocab_size, units].
        bias: [vocab_size].
    """
    targets = tf.convert_to_tensor(targets)

    @tf.custom_gradient
    def run(hidden: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> Any:
        losses, normalisers = _losses(hidden, targets, kernel, bias)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            return _gradients(upstream, hidden, targets, kernel, bias, normalisers)

        return losses, gradient

    return run(*map(tf.convert_to_tensor, (hidden, kernel, bias)))


def cross_entropy_sum(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tf.Tensor:
    """Returns the sum of `cross_entropy`; arguments as there.

    Where a tape records, the gradients are computed together with the sum, whose weight is one for
    all tokens: three products instead of four.
    """
    tensors = [tf.convert_to_tensor(tensor) for tensor in (hidden, kernel, bias)]
    if not record.should_record_backprop(tensors):
        return tf.reduce_sum(cross_entropy(hidden, targets, kernel, bias))
    targets = tf.convert_to_tensor(targets)

    @tf.custom_gradient
    def run(hidden: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> Any:
        total, *gradients = _sum_and_gradients(hidden, targets, kernel, bias)
        return total, lambda upstream: [upstream * gradient for gradient in gradients]

    return run(*tensors)


def _sum_and_gradients(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the sum of the losses, and its gradients in hidden, kernel and bias."""

    def chunk(start: tf.Tensor, stop: tf.Tensor, sums: list[Any], number: tf.Tensor) -> list[Any]:
        total, d_hidden, d_kernel, d_bias = sums
        some = hidden[start:stop]
        logits = tf.matmul(some, kernel, transpose_b=True) + bias  # [chunk, vocab]
        losses, d_logits = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
            features=logits, labels=targets[start:stop]
        )
        return [
            total + tf.reduce_sum(losses),
            d_hidden.write(number, tf.matmul(d_logits, kernel)),
            d_kernel + tf.matmul(d_logits, some, transpose_a=True),
            d_bias + tf.reduce_sum(d_logits, axis=0),
        ]

    size = _chunk_tokens(kernel, CHUNK_LOGITS)
    sums = [_array(hidden, size, [hidden.shape[1]]), tf.zeros_like(kernel), tf.zeros_like(bias)]
    zero = tf.zeros([], hidden.dtype)
    total, d_hidden, d_kernel, d_bias = _over_chunks(hidden, size, chunk, [zero, *sums])
    return total, d_hidden.concat(), d_kernel, d_bias


def _losses(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the losses and the logarithms of the normalisers: [tokens] each."""

    def chunk(
        start: tf.Tensor, stop: tf.Tensor, arrays: list[tf.TensorArray], number: tf.Tensor
    ) -> list[tf.TensorArray]:
        logits = tf.matmul(hidden[start:stop], kernel, transpose_b=True) + bias  # [chunk, vocab]
        normalisers = tf.reduce_logsumexp(logits, axis=1)
        losses = normalisers - tf.gather(logits, targets[start:stop], axis=1, batch_dims=1)
        values = (losses, normalisers)
        return [a.write(number, value) for a, value in zip(arrays, values, strict=True)]

    size = _chunk_tokens(kernel, CHUNK_LOGITS)
    arrays = [_array(hidden, size, []) for _ in range(2)]
    losses, normalisers = _over_chunks(hidden, size, chunk, arrays)
    return losses.concat(), normalisers.concat()


def _gradients(
    upstream: tf.Tensor,
    hidden: tf.Tensor,
    targets: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    normalisers: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of hidden, kernel and bias.

    The gradient of the logits is the probabilities, chunk by chunk, minus one at each target.
    """

    def chunk(start: tf.Tensor, stop: tf.Tensor, sums: list[Any], number: tf.Tensor) -> list[Any]:
        d_hidden, d_kernel, d_bias = sums
        some = hidden[start:stop]
        logits = tf.matmul(some, kernel, transpose_b=True) + bias  # [chunk, vocab]
        d_logits = tf.exp(logits - normalisers[start:stop, None]) * upstream[start:stop, None]
        return [
            d_hidden.write(number, tf.matmul(d_logits, kernel)),
            d_kernel + tf.matmul(d_logits, some, transpose_a=True),
            d_bias + tf.reduce_sum(d_logits, axis=0),
        ]

    size = _chunk_tokens(kernel, CHUNK_LOGITS)
    width = [hidden.shape[1]]
    sums = [_array(hidden, size, width), tf.zeros_like(kernel), tf.zeros_like(bias)]
    d_hidden, d_kernel, d_bias = _over_chunks(hidden, size, chunk, sums)
    vocab_size = kernel.shape[0]
    weighted = upstream[:, None]
    return (
        d_hidden.concat() - weighted * tf.gather(kernel, targets),
        d_kernel - tf.math.unsorted_segment_sum(weighted * hidden, targets, vocab_size),
        d_bias - tf.math.unsorted_segment_sum(upstream, targets, vocab_size),
    )


def _over_chunks(
    hidden: tf.Tensor, size: int, chunk: Callable[..., list[Any]], values: list[Any]
) -> list[Any]:
    """Returns `values` after chunk(start, stop, values, number) for every `size` tokens."""
    tokens = tf.shape(hidden)[0]

    def step(number: tf.Tensor, values: list[Any]) -> tuple[tf.Tensor, list[Any]]:
        start = number * size
        return number + 1, chunk(start, tf.minimum(start + size, tokens), values, number)

    count = _num_chunks(hidden, size)
    _, values = tf.while_loop(
        lambda number, values: number < count, step, (0, values), parallel_iterations=1
    )
    return values


def _array(hidden: tf.Tensor, size: int, shape: list[int]) -> tf.TensorArray:
    return tf.TensorArray(
        hidden.dtype, _num_chunks(hidden, size), infer_shape=False, element_shape=[None, *shape]
    )


def _chunk_tokens(kernel: tf.Tensor, logits: int) -> int:
    return max(1, logits // kernel.shape[0])


def _num_chunks(hidden: tf.Tensor, size: int) -> tf.Tensor:
    return tf.maximum(1, -(-tf.shape(hidden)[0] // size))


def sampled_cross_entropy(
    hidden: tf.Tensor,
    targets: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    num_sampled: int,
    seed: tf.Tensor,
    products: tf.DType = tf.float32,
) -> tf.Tensor:
    """Returns the sampled cross-entropy, in nats: float32 [tokens].

    All tokens share the candidates, which are drawn with replacement from the log-uniform
    distribution; it suits ids sorted by falling frequency. Shapes as in `cross_entropy`.

    Args:
        num_sampled: Number of candidates.
        seed: int32 [2]. The candidates depend on nothing else, so that all workers share them, and
            N workers compute the same as one.
        products: Type of the products with candidates.
    """
    vocab_size = kernel.shape[0]
    candidates = log_uniform_candidates(vocab_size, num_sampled, seed)
    # In one lookup, so that a word that is both target and candidate has one gradient row.
    read = tf.concat([targets, candidates], 0)
    weights, biases = lookup(kernel, read), lookup(bias, read)
    target_weights, candidate_weights = tf.split(weights, [tf.size(targets), num_sampled])
    target_biases, candidate_biases = tf.split(biases, [tf.size(targets), num_sampled])
    candidate_weights.set_shape([num_sampled, kernel.shape[1]])  # unknown after the lookup
    candidate_biases.set_shape([num_sampled])
    target_logits = tf.reduce_sum(hidden * target_weights, axis=1) + target_biases
    offsets = candidate_biases - log_expected_count(candidates, vocab_size, num_sampled)
    run = _over_candidates(targets, candidates, products)
    return run(target_logits, hidden, candidate_weights, offsets)


def _over_candidates(
    targets: tf.Tensor, candidates: tf.Tensor, products: tf.DType
) -> Callable[..., tf.Tensor]:
    """Returns the loss as a function of the targets' logits and the candidates' factors.

    It keeps one array [tokens, candidates], and computes chunk by chunk, in the cache. With
    TensorFlow's gradient each of a dozen operations would read and write the whole array.
    """

    @tf.custom_gradient
    def run(
        target_logits: tf.Tensor, hidden: tf.Tensor, weights: tf.Tensor, offsets: tf.Tensor
    ) -> Any:
        def chunk(
            start: tf.Tensor, stop: tf.Tensor, arrays: list[Any], number: tf.Tensor
        ) -> list[Any]:
            logits = _product(hidden[start:stop], weights, products, transpose_b=True) + offsets
            is_target = targets[start:stop, None] == candidates
            logits = tf.where(is_target, logits.dtype.min, logits)
            target = target_logits[start:stop]
            largest = tf.maximum(tf.reduce_max(logits, axis=1), target)
            parts = tf.exp(logits - largest[:, None])  # [chunk, candidates]
            of_target = tf.exp(target - largest)
            sums = tf.reduce_sum(parts, axis=1) + of_target
            values = (parts, sums, tf.math.log(sums) + largest - target, of_target / sums)
            return [a.write(number, value) for a, value in zip(arrays, values, strict=True)]

        size = _chunk_tokens(weights, CHUNK_SAMPLED_LOGITS)
        shapes: list[list[int]] = [[weights.shape[0]], [], [], []]
        arrays = [_array(hidden, size, shape) for shape in shapes]
        parts, sums, losses, of_target = _over_chunks(hidden, size, chunk, arrays)
        sums, of_target = sums.concat(), of_target.concat()

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, ...]:
            with tf.name_scope("softmax_backward"):  # for a profile
                others = _candidate_gradients(upstream / sums, parts, hidden, weights, products)
            return upstream * (of_target - 1.0), *others

        return losses.concat(), gradient

    return run


def _candidate_gradients(
    factors: tf.Tensor, parts: tf.TensorArray, hidden: tf.Tensor, weights: tf.Tensor, products: Any
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the gradients of hidden, weights and offsets.

    Args:
        factors: [tokens], what the chunks of `parts`, [chunk, candidates], are multiplied by.
    """

    def chunk(start: tf.Tensor, stop: tf.Tensor, sums: list[Any], number: tf.Tensor) -> list[Any]:
        d_hidden, d_weights, d_offsets = sums
        d_logits = parts.read(number) * factors[start:stop, None]
        return [
            d_hidden.write(number, _product(d_logits, weights, products)),
            d_weights + _product(d_logits, hidden[start:stop], products, transpose_a=True),
            d_offsets + tf.reduce_sum(d_logits, axis=0),
        ]

    size = _chunk_tokens(weights, CHUNK_SAMPLED_LOGITS)
    d_hidden = _array(hidden, size, [hidden.shape[1]])
    sums = [d_hidden, tf.zeros_like(weights), tf.zeros(weights.shape[:1], weights.dtype)]
    d_hidden, d_weights, d_offsets = _over_chunks(hidden, size, chunk, sums)
    return d_hidden.concat(), d_weights, d_offsets


def _product(a: tf.Tensor, b: tf.Tensor, dtype: tf.DType, **transposed: bool) -> tf.Tensor:
    return tf.cast(tf.matmul(tf.cast(a, dtype), tf.cast(b, dtype), **transposed), a.dtype)


def log_uniform_candidates(vocab_size: int, num_sampled: int, seed: tf.Tensor) -> tf.Tensor:
    """Returns int32 [num_sampled] ids, P(id) = log((id + 2) / (id + 1)) / log(vocab_size + 1)."""
    uniform = tf.random.stateless_uniform([num_sampled], seed, dtype=tf.float32)
    ids = tf.exp(uniform * math.log(vocab_size + 1)) - 1.0
    return tf.minimum(tf.cast(ids, tf.int32), vocab_size - 1)


def log_expected_count(ids: tf.Tensor, vocab_size: int, num_sampled: int) -> tf.Tensor:
    """Returns the logarithm of each id's expected count among the candidates: float32."""
    ids = tf.cast(ids, tf.float32)
    probability = tf.math.log1p(1.0 / (ids + 1.0)) / math.log(vocab_size + 1)
    return tf.math.log(probability * num_sampled)
