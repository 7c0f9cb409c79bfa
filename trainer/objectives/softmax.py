"""Cross-entropy over a large vocabulary: exact, and sampled for training.

The sampled softmax estimates the full one by importance sampling (Bengio & Senecal 2003; Jean et
al. 2015, section 3): the normaliser is the target's own term plus those of a few random words,
each divided by the number of times that it is expected among them. The target's term is exact, so
the estimate of the normaliser is unbiased, also where frequent words are drawn many times.
"""

import math

import tensorflow as tf

from trainer.tables import read_rows

CHUNK_TOKENS = 1024


def cross_entropy(
    hidden: tf.Tensor, targets: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tf.Tensor:
    """Returns the exact cross-entropy, in nats: float32 [tokens].

    Computed CHUNK_TOKENS at a time, so that evaluation never holds [tokens, vocab_size]. A
    gradient through it does hold that.

    Args:
      hidden: [tokens, units].
      targets: int32 [tokens].
      kernel: [vocab_size, units].
      bias: [vocab_size].
    """

    def chunk_losses(chunk: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        chunk_hidden, chunk_targets = chunk
        logits = tf.matmul(chunk_hidden, kernel, transpose_b=True) + bias  # [chunk, vocab]
        return tf.nn.sparse_softmax_cross_entropy_with_logits(chunk_targets, logits)

    tokens = tf.size(targets)
    padding = -tokens % CHUNK_TOKENS
    hidden = tf.reshape(tf.pad(hidden, [[0, padding], [0, 0]]), [-1, CHUNK_TOKENS, hidden.shape[1]])
    targets = tf.reshape(tf.pad(targets, [[0, padding]]), [-1, CHUNK_TOKENS])
    losses = tf.map_fn(
        chunk_losses,
        (hidden, targets),
        parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([CHUNK_TOKENS], hidden.dtype),
    )
    return tf.reshape(losses, [-1])[:tokens]


def sampled_cross_entropy(
    hidden: tf.Tensor,
    targets: tf.Tensor,
    kernel: tf.Tensor,
    bias: tf.Tensor,
    num_sampled: int,
    seed: tf.Tensor,
) -> tf.Tensor:
    """Returns the sampled cross-entropy, in nats: float32 [tokens].

    The candidates are drawn with replacement from the log-uniform distribution, which suits ids
    sorted by falling frequency, and are shared by all tokens. Shapes as in `cross_entropy`.

    Args:
      num_sampled: number of candidates.
      seed: int32 [2]; the candidates are a function of it alone, so that all workers, given
        the same seed, share them, and N workers compute what one would.
    """
    vocab_size = kernel.shape[0]
    candidates = log_uniform_candidates(vocab_size, num_sampled, seed)
    # Read together, so that a word's gradient is one row even where it is both.
    read = tf.concat([targets, candidates], 0)
    weights, biases = read_rows(kernel, read), read_rows(bias, read)
    target_weights, candidate_weights = tf.split(weights, [tf.size(targets), num_sampled])
    target_biases, candidate_biases = tf.split(biases, [tf.size(targets), num_sampled])
    target_logits = tf.reduce_sum(hidden * target_weights, axis=1) + target_biases
    candidate_logits = tf.matmul(hidden, candidate_weights, transpose_b=True)
    candidate_logits += candidate_biases  # [tokens, candidates]

    candidate_logits -= log_expected_count(candidates, vocab_size, num_sampled)
    is_target = targets[:, None] == candidates
    candidate_logits = tf.where(is_target, candidate_logits.dtype.min, candidate_logits)
    logits = tf.concat([target_logits[:, None], candidate_logits], axis=1)
    return tf.reduce_logsumexp(logits, axis=1) - target_logits


def log_uniform_candidates(vocab_size: int, num_sampled: int, seed: tf.Tensor) -> tf.Tensor:
    """Returns int32 [num_sampled] ids, P(id) = log((id + 2) / (id + 1)) / log(vocab_size + 1)."""
    uniform = tf.random.stateless_uniform([num_sampled], seed, dtype=tf.float32)
    ids = tf.exp(uniform * math.log(vocab_size + 1)) - 1.0
    return tf.minimum(tf.cast(ids, tf.int32), vocab_size - 1)


def log_expected_count(ids: tf.Tensor, vocab_size: int, num_sampled: int) -> tf.Tensor:
    """Returns the log of how often each id is expected among the candidates: float32."""
    ids = tf.cast(ids, tf.float32)
    probability = tf.math.log1p(1.0 / (ids + 1.0)) / math.log(vocab_size + 1)
    return tf.math.log(probability * num_sampled)
