import numpy as np
import pytest
import tensorflow as tf

from trainer import native
from trainer.distribution.weight_statistics import of_weights
from trainer.models.lstm import WarmLSTM
from trainer.training.gradients import added, dense, distinct_rows, divided, loss_and_gradients

VOCAB_SIZE, WIDTH = 7, 3


def bag_of_words() -> tuple:
    random = np.random.default_rng(0)
    table = tf.Variable(random.normal(size=(VOCAB_SIZE, WIDTH)), dtype=tf.float64)
    kernel = tf.Variable(random.normal(size=(WIDTH, 2)), dtype=tf.float64)
    rows = {
        "tokens": tf.constant(random.integers(0, VOCAB_SIZE - 2, (5, 4)), tf.int32),
        "lengths": tf.fill([5], 4),
    }

    def loss_sum(some: dict, shard: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        embedded = tf.reduce_sum(tf.nn.embedding_lookup(table, some["tokens"]), axis=1)
        outputs = tf.tanh(tf.matmul(embedded, kernel))
        return tf.reduce_sum(outputs**2), tf.cast(tf.shape(outputs)[0], tf.float64)

    return loss_sum, [table, kernel], rows


@pytest.mark.parametrize("parts", [2, 3, 5, 8])
def test_in_parts_the_gradients_are_those_of_the_whole(parts: int) -> None:
    loss_sum, variables, rows = bag_of_words()

    @tf.function
    def run(count: int) -> tuple:
        loss, weight, gradients = loss_and_gradients(loss_sum, variables, rows, 0, count)[:3]
        assert isinstance(gradients[0], tf.IndexedSlices)
        return loss, weight, [dense(g) for g in gradients]

    expected, found = run(1), run(parts)
    for one, other in zip(tf.nest.flatten(expected), tf.nest.flatten(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-13, atol=1e-15)


def test_each_part_draws_as_the_shard_that_it_would_be() -> None:
    def loss_sum(rows: dict, shard: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seen.append(shard)
        return variable * tf.cast(shard, tf.float32), tf.constant(1.0)

    variable = tf.Variable(1.0)
    seen: list = []
    rows = {"lengths": tf.ones([6], tf.int32)}
    loss = tf.function(lambda: loss_and_gradients(loss_sum, [variable], rows, 2, 3).loss)()
    assert loss == 6 + 7 + 8


@pytest.mark.parametrize("units", [5, 16])
def test_dense_gradients_have_their_variables_shapes_while_they_are_traced(units: int) -> None:
    layer = WarmLSTM(units, return_sequences=True)
    layer.build((None, None, 3))
    variables = [variable.value for variable in layer.trainable_variables]

    def loss_sum(rows: dict, shard: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(layer(rows["inputs"], training=True)), tf.constant(1.0)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3])])
    def run(inputs: tf.Tensor) -> list[tf.Tensor]:
        gradients = loss_and_gradients(loss_sum, variables, {"inputs": inputs}, 0).gradients
        assert [g.shape for g in gradients] == [v.shape for v in variables]
        return gradients

    with native.using(None):
        run(tf.ones([2, 4, 3]))


def test_distinct_rows_are_the_same_gradient() -> None:
    slices = tf.IndexedSlices(
        tf.constant([[1.0], [2.0], [4.0], [8.0]]),
        tf.constant([3, 1, 3, 0], tf.int64),
        tf.constant([5, 1], tf.int64),
    )
    distinct = distinct_rows(slices)
    assert distinct.indices.numpy().tolist() == [3, 1, 0]
    np.testing.assert_array_equal(dense(distinct), dense(slices))
    np.testing.assert_array_equal(dense(slices)[:, 0], [8, 2, 0, 5, 0])
    np.testing.assert_array_equal(dense(divided(slices, tf.constant(2.0)))[:, 0], [4, 1, 0, 2.5, 0])


@pytest.mark.parametrize("parts", [2, 5, 8])
def test_what_rows_carry_is_put_together_from_the_parts(parts: int) -> None:
    variable = tf.Variable(2.0)
    rows = {"lengths": tf.ones([5], tf.int32), "carried": tf.reshape(tf.range(10.0), [5, 2])}

    def loss_sum(some: dict, shard: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.reduce_sum(some["carried"]) * variable, variable, some["carried"] + 1

    for count in (1, parts):
        found = tf.function(lambda n: loss_and_gradients(loss_sum, [variable], rows, 0, n)[:4])
        loss, _, _, carried = found(count)
        assert loss == 90
        np.testing.assert_array_equal(carried, [rows["carried"] + 1])


def test_gradients_through_statistics_of_the_weights_are_those_of_the_whole_table() -> None:
    loss_of_rows, variables, rows = bag_of_words()
    table = variables[0]

    def loss_sum(some: dict, shard: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        loss, weight = loss_of_rows(some, shard)
        mean, gram = of_weights(
            lambda: (tf.reduce_mean(table, axis=0), tf.matmul(table, table, transpose_a=True))
        )
        return loss * tf.reduce_sum(mean) + weight * tf.reduce_sum(tf.sin(gram)), weight

    with tf.GradientTape() as tape:
        loss, _ = loss_sum(rows, 0)
    expected = tape.gradient(loss, variables)

    @tf.function
    def of_two_shards() -> list[tf.Tensor]:
        shards = [
            loss_and_gradients(loss_sum, variables, {k: v[part] for k, v in rows.items()}, 0)
            for part in (slice(0, 2), slice(2, 5))
        ]
        assert isinstance(shards[0].gradients[0], tf.IndexedSlices)  # only rows of the batch
        each = zip(*(shard.of_statistics for shard in shards), strict=True)
        through = shards[0].through_statistics([tf.add(*both) for both in each])
        assert through[1] is None  # the kernel is in no statistic
        rows_of = [[dense(g) for g in shard.gradients] for shard in shards]
        return added([tf.add(*both) for both in zip(*rows_of, strict=True)], through)

    for one, other in zip(expected, of_two_shards(), strict=True):
        np.testing.assert_allclose(other, tf.convert_to_tensor(one), rtol=1e-12)
