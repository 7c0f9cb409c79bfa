"""The table of where a step's time goes."""

from collections import Counter
from pathlib import Path

import pytest
import tensorflow as tf

from trainer.config import step_range
from trainer.models.lstm import WarmLSTM
from trainer.reporting.profile import Profiler, part_of, table, times_of


def test_a_step_of_the_layer_is_seen_by_its_parts(tmp_path: Path) -> None:
    layer = WarmLSTM(8, return_sequences=True)
    inputs = tf.random.stateless_normal((4, 20, 6), (0, 0))
    layer.build(inputs.shape)
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step() -> list:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(inputs, training=True) ** 2)
        return tape.gradient(loss, weights)

    step()
    lines: list[str] = []
    profiler = Profiler(2, 4, tmp_path, lines.append)
    for number in range(1, 6):
        profiler.before(number)
        step()[0].numpy()
        profiler.after(number)
    assert len(lines) == 1 and lines[0].startswith("profile of steps 2 to 4")
    times = times_of(tmp_path)
    assert times["LSTM, forward"] > 0 and times["LSTM, backward"] > 0
    assert "LSTM, forward" in lines[0] and " %" in lines[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("lstm_forward/while/body/_1/lstm_forward/while/MatMul:_MklMatMul", "LSTM, forward"),
        ("gradient_tape/lstm_backward/while/MatMul:_MklMatMul", "LSTM, backward"),
        ("gradient_tape/softmax/MatMul:_MklMatMul", "softmax"),
        ("collective/CollectiveReduceV2:CollectiveReduceV2", "collectives"),
        ("optimizer/adam/update/ResourceScatterUpdate:ResourceScatterUpdate", "optimizer"),
        ("Mul:Mul", "all else"),
    ],
)
def test_an_operation_belongs_to_a_part(name: str, part: str) -> None:
    assert part_of(name) == part


def test_the_table_falls_and_adds_up() -> None:
    lines = table(Counter({"softmax": 1.0, "optimizer": 3.0}), steps=2).splitlines()
    assert lines[1].split() == ["optimizer", "1.50", "75.0", "%"]
    assert lines[2].split() == ["softmax", "0.50", "25.0", "%"]


@pytest.mark.parametrize("text", ["", "5", "0:3", "4:3", "a:b", "1:2:3", "-1:2", "1: 2"])
def test_what_is_no_range_of_steps(text: str) -> None:
    assert step_range(text) is None
    assert step_range("4:4") == (4, 4)
