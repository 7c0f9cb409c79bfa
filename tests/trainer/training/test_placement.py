"""Every operation of a training step has a GPU kernel, or a reason to run on the host.

No GPU is needed: TensorFlow's wheel registers all its GPU kernels, and a graph that is traced as if
there were a GPU holds the operations that one would run, cuDNN's LSTM among them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.framework import kernels

from data_pipelines.store.token_store import TokenStore
from trainer.config import Config
from trainer.distribution.tf_distribute import one_device
from trainer.reporting.status_server import Vitals
from trainer.stages import finetune, pretrain
from trainer.training.loop import Training
from trainer.training.run import Run

# Placeholders of a function and what only names a value: no kernel runs.
STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp"}
# Not deterministic on a GPU where an index comes twice: run_stage.turn_on_determinism says why none
# may be in a step. ResourceScatterUpdate may: its rows are distinct.
SCATTERS = {
    *("ResourceScatterAdd", "ResourceScatterSub", "ResourceScatterMul", "ResourceScatterDiv"),
    *("ResourceScatterMin", "ResourceScatterMax", "ResourceScatterNdUpdate"),
    *("ResourceScatterNdAdd", "ResourceScatterNdSub", "ScatterNd", "ScatterNdUpdate"),
    *("TensorScatterUpdate", "TensorScatterAdd", "TensorScatterSub", "TensorScatterMax"),
}
PRETRAINING = {
    "autoencoder": {"pretrain_word_dropout": 0.5, "pretrain_dropout": 0.1},
    "language model": {
        "pretrain_objective": "language_model",
        "pretrain_packing": "stream",
        "tied_softmax": True,
        "pretrain_subsampling": 1e-3,
        "precision": "mixed_bfloat16",
    },
    "exact softmax, float16": {"sampled_softmax": 0, "precision": "mixed_float16"},
}
PRETRAINING_SLOW = {
    "bag autoencoder": {"pretrain_objective": "bag_autoencoder", "recurrent_weight_dropout": 0.3},
    "micro-batches": {"accumulate_steps": 2},
    "one layer": {"num_layers": 1},
    "dense tables": {"sparse_reduce": "dense"},
    "skip": {"on_nonfinite": "skip"},
    "adamw": {"optimizer": "adamw"},
    "nadam": {"optimizer": "nadam"},
    "sgd": {"optimizer": "sgd"},
}
FINETUNING = {
    "adversarial": {
        "adversarial_weight": 1.0,
        "virtual_adversarial_weight": 1.0,
        "pooling": "concat",
        "finetune_ema": 0.9,
        "label_smoothing": 0.1,
    },
    "linear gain": {
        "label_gain": "linear",
        "finetune_dropout": 0.3,
        "recurrent_weight_dropout": 0.3,
    },
}
FINETUNING_SLOW = {
    "joint": {"joint_weight": 0.1},
    "adversarial, bfloat16": {"adversarial_weight": 1.0, "precision": "mixed_bfloat16"},
    "adversarial, float16": {"adversarial_weight": 1.0, "precision": "mixed_float16"},
    "state of the document": {"initial_state": "encode"},
    "frozen first": {"encoder_frozen_steps": 2, "layer_rate": 0.5},
}


def cases(quick: dict[str, Any], slow: dict[str, Any]) -> list[Any]:
    """Returns the flags of each case as a parameter; slow cases are left to make test-all."""
    return [pytest.param(flags, id=name) for name, flags in quick.items()] + [
        pytest.param(flags, id=name, marks=pytest.mark.slow) for name, flags in slow.items()
    ]


@pytest.fixture
def trace(
    as_if_on_a_gpu: None, small_store: Path, encoder_bundle: Path, tmp_path: Path
) -> Iterator[Callable[..., list[NodeDef]]]:
    """Returns trace(stage, **flags): the operations of a step of that stage."""
    import keras

    policy = keras.config.dtype_policy()

    def nodes(stage: Any, **flags: Any) -> list[NodeDef]:
        common = {"run_dir": str(tmp_path), "store": str(small_store), "sampled_softmax": 64}
        common |= {"encoder": str(encoder_bundle), "embedding_dim": 4, "units": 5, "num_layers": 2}
        config = Config(stage=stage.__name__.rpartition(".")[2], **(common | flags))
        run = Run(config, one_device(), TokenStore(small_store), None, lambda line: None, Vitals())
        _, task, batches, *_ = stage.set_up(run, tmp_path / "stage")
        step = Training(run, task, batches).step
        graphs = [step.function.get_concrete_function().graph.as_graph_def()]
        if hasattr(step, "_apply"):
            graphs.append(step._apply.get_concrete_function().graph.as_graph_def())
        return [
            node
            for graph in graphs
            for nodes in (graph.node, *(function.node_def for function in graph.library.function))
            for node in nodes
        ]

    yield nodes
    keras.config.set_dtype_policy(policy)


def without_gpu_kernel(nodes: list[NodeDef]) -> dict[str, str]:
    """Returns the operations that a GPU cannot run, and the types that they are for."""
    found = {}
    for node in nodes:
        if node.op in STRUCTURE or is_message(node) or has_gpu_kernel(node):
            continue
        types = {name: value.type for name, value in node.attr.items() if value.type}
        found[node.op] = str(types)
    return found


def is_message(node: NodeDef) -> bool:
    """Returns whether the operation is a constant text: of an assertion's message."""
    return node.op == "Const" and node.attr["dtype"].type == tf.string.as_datatype_enum


def has_gpu_kernel(node: NodeDef) -> bool:
    """Returns whether a kernel for a GPU is registered for the operation's attributes."""
    for kernel in kernels.get_registered_kernels_for_op(node.op).kernel:
        if kernel.device_type in ("GPU", "DEFAULT") and all(
            node.attr[constraint.name].type in constraint.allowed_values.list.type
            or set(node.attr[constraint.name].list.type) & set(constraint.allowed_values.list.type)
            for constraint in kernel.constraint
        ):
            return True
    return False


@pytest.mark.parametrize("flags", cases(PRETRAINING, PRETRAINING_SLOW))
def test_pretraining_runs_on_a_gpu(trace: Callable[..., Any], flags: dict[str, Any]) -> None:
    nodes = trace(pretrain, **flags)
    assert without_gpu_kernel(nodes) == {}
    operations = {node.op for node in nodes}
    assert {"CudnnRNNV3", "CudnnRNNBackpropV3"} <= operations
    assert not operations & SCATTERS, operations & SCATTERS


@pytest.mark.parametrize("flags", cases(FINETUNING, FINETUNING_SLOW))
def test_finetuning_runs_on_a_gpu(trace: Callable[..., Any], flags: dict[str, Any]) -> None:
    nodes = trace(finetune, **flags)
    assert without_gpu_kernel(nodes) == {}
    operations = {node.op for node in nodes}
    assert {"CudnnRNNV3", "CudnnRNNBackpropV3"} <= operations
    assert not operations & SCATTERS, operations & SCATTERS


def test_an_operation_of_the_host_is_found() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def host_only(texts: tf.Tensor) -> tf.Tensor:
        return tf.strings.length(tf.strings.lower(texts))

    nodes = list(host_only.get_concrete_function().graph.as_graph_def().node)
    assert set(without_gpu_kernel(nodes)) >= {"StringLower"}


def test_a_scatter_with_duplicates_is_found() -> None:
    @tf.function
    def scatters() -> tf.Tensor:
        return tf.tensor_scatter_nd_add(tf.zeros([3]), [[0], [0]], [1.0, 2.0])

    nodes = scatters.get_concrete_function().graph.as_graph_def().node
    assert {node.op for node in nodes} & SCATTERS == {"TensorScatterAdd"}
