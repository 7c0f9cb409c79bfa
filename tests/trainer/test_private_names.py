"""Every private name of TensorFlow and Keras that the product uses, and that it is still there.

pyproject.toml bounds both packages because of these. Raising a bound begins here.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
import tensorflow as tf

from tests.test_house import requirements

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipelines", "launch", "trainer", "warmstate")
PUBLIC = {"_exit", "_asdict", "_fields"}  # of os and of named tuples
OF_DATASETS = {"_fingerprint"}  # Hugging Face's


def private_uses() -> set[str]:
    """Returns the private attributes of foreign objects and the private modules in the sources."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            ours.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
    found = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr[:1] == "_" != node.attr[1:2]
        if ast.unparse(node.value) not in ("self", "cls")
        if node.attr not in ours - CHECKS.keys()
    }
    for node in nodes:
        module = (isinstance(node, ast.ImportFrom) and node.module) or ""
        if module.startswith(("tensorflow.python", "keras.src")):
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found - PUBLIC - OF_DATASETS


def trained_adam() -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5))
    optimizer.build([keras.Variable([0.0])])
    return optimizer


def model() -> keras.Model:
    inputs = keras.Input((3, 2))
    return keras.Model(inputs, keras.layers.LSTM(4, name="lstm")(inputs))


def mirrored_value() -> Any:
    strategy = tf.distribute.MirroredStrategy(tf.config.list_logical_devices("CPU")[:2])
    with strategy.scope():
        return strategy, tf.Variable([1.0, 2.0])


def _schedule() -> bool:
    return float(trained_adam()._learning_rate(0)) == pytest.approx(0.1)


def _moments() -> bool:
    optimizer = trained_adam()
    return len(optimizer._momentums) == len(optimizer._velocities) == 1


def _variable_index() -> bool:
    optimizer, variable = keras.optimizers.SGD(), keras.Variable([0.0])
    optimizer.build([variable])
    return optimizer._get_variable_index(variable) == 0


def _inner_model() -> bool:
    sequential = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    return isinstance(sequential._functional, keras.Model)


def _history() -> bool:
    made = model()
    layer, _, index = made.outputs[0]._keras_history
    return (layer, index) == (made.get_layer("lstm"), 0)


def _nodes() -> bool:
    made = model()
    operations = [n.operation for nodes in made._nodes_by_depth.values() for n in nodes]
    (node,) = made.get_layer("lstm")._inbound_nodes
    return made.get_layer("lstm") in operations and "initial_state" not in node.arguments.kwargs


def _parts() -> bool:
    found = list(model()._flatten_layers(include_self=False, recursive=False))
    return [type(layer).__name__ for layer in found] == ["InputLayer", "LSTM"]


def _handle() -> bool:
    return keras.Variable([0.0])._value.handle.dtype == tf.resource


def _of_mirrored() -> bool:
    _, variable = mirrored_value()
    return variable._get().numpy().tolist() == [1.0, 2.0]


def _replica() -> bool:
    strategy, _ = mirrored_value()
    return strategy.run(lambda: tf.distribute.get_replica_context()._replica_id) is not None


def _launcher_names() -> bool:
    """A multi-worker strategy needs a process for itself: tests/integration has many."""
    from tensorflow.python.distribute import cross_device_ops, cross_device_utils

    launcher = cross_device_utils.CollectiveReplicaLauncher
    options = tf.distribute.experimental.CommunicationOptions()
    made = launcher(7, 1, cross_device_utils.CollectiveKeys(), "cpu:0", options)
    return (
        made._group_key == 7
        and made._options.implementation.value == "AUTO"
        and callable(made._get_ordering_token)
        and "self._launchers" in _source(cross_device_ops.CollectiveAllReduce)
    )


def _cross_device_ops() -> bool:
    strategy, _ = mirrored_value()
    return hasattr(strategy.extended, "_cross_device_ops")


def _source(thing: object) -> str:
    import inspect

    return inspect.getsource(thing)


def _record() -> bool:
    from tensorflow.python.eager import record

    watched = tf.constant(1.0)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        recorded = record.should_record_backprop([watched])
        with record.stop_recording():
            return recorded and not record.should_record_backprop([watched])


def _context() -> bool:
    from tensorflow.python.eager import context

    names = ("configure_coordination_service", "get_config_key_value", "abort_collective_ops")
    return all(callable(getattr(context.context(), name)) for name in names)


def _config() -> bool:
    from tensorflow.python.framework import config

    return config.is_op_determinism_enabled() in (True, False) and callable(
        config.disable_op_determinism
    )


def _registered_gradients() -> bool:
    from tensorflow.python.framework import ops

    known = set(ops.gradient_registry._registry)
    square = tf.custom_gradient(lambda x: (x * x, lambda upstream: 2 * x * upstream))
    tf.function(square).get_concrete_function(tf.TensorSpec([], tf.float32))
    (new,) = set(ops.gradient_registry._registry) - known
    return new.startswith("CustomGradient-")


CHECKS: dict[str, Callable[[], bool]] = {
    "_learning_rate": _schedule,
    "_momentums": _moments,
    "_velocities": _moments,
    "_get_variable_index": _variable_index,
    "_functional": _inner_model,
    "_keras_history": _history,
    "_nodes_by_depth": _nodes,
    "_inbound_nodes": _nodes,
    "_flatten_layers": _parts,
    "_value": _handle,
    "_get": _of_mirrored,
    "_replica_id": _replica,
    "_launchers": _launcher_names,
    "_group_key": _launcher_names,
    "_get_ordering_token": _launcher_names,
    "_options": _launcher_names,
    "_cross_device_ops": _cross_device_ops,
    "tensorflow.python.eager.record": _record,
    "tensorflow.python.eager.context": _context,
    "tensorflow.python.framework.config": _config,
    "tensorflow.python.framework.ops": _registered_gradients,
    "_registry": _registered_gradients,
}


def test_every_private_name_has_a_check() -> None:
    assert private_uses() == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_private_name_is_what_it_was(name: str) -> None:
    assert CHECKS[name]()


def test_the_bounds_hold_what_was_checked() -> None:
    for package, module in (("tensorflow", tf), ("keras", keras)):
        major, minor = map(int, module.__version__.split(".")[:2])
        assert requirements()[package] == f">={major}.{minor},<{major}.{minor + 1}"
