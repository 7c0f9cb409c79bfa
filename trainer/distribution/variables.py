"""Reads, assigns and digests variables, and looks up rows of them."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.durable import pieces
from data_pipelines.errors import InputError

_LOOKUP = "_warmstate_lookup"


def values_of(variables: Mapping[str, keras.Variable]) -> dict[str, np.ndarray]:
    """Returns the variables' values by name."""
    return {name: np.asarray(variable.numpy()) for name, variable in variables.items()}


def assign(variables: Mapping[str, keras.Variable], tensors: Mapping[str, np.ndarray]) -> None:
    """Sets each variable to the tensor of its name.

    Raises:
        InputError: A tensor is missing or has another shape or type; no variable is set then.
    """
    for name, variable in variables.items():
        if name not in tensors:
            raise InputError(f"the bundle holds no tensor {name!r}; it holds {sorted(tensors)}")
        found = (tuple(tensors[name].shape), str(tensors[name].dtype))
        if found != (tuple(variable.shape), variable.dtype):
            raise InputError(
                f"the bundle's tensor {name!r} is {found[0]} {found[1]}, "
                f"but the model's is {tuple(variable.shape)} {variable.dtype}"
            )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def digest(tensors: Mapping[str, np.ndarray], pause: Callable[[], None] | None = None) -> str:
    """Returns the SHA-256 (hex) of the tensors: names, dtypes, shapes and bytes.

    Args:
        pause: Is called after every `durable.PIECE_BYTES`.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        for piece in pieces(array.reshape(-1).view(np.uint8)):
            sha.update(piece)
            if pause:
                pause()
    return sha.hexdigest()


def take_rows(table: tf.Variable, indices: tf.Tensor) -> tf.Tensor:
    """Returns rows of `table`, a variable's `value`, and reads no others.

    Of a mirrored variable tf.gather reads the whole, and the next write to rows copies it.
    """
    mirrored = isinstance(table, tf.distribute.DistributedValues)
    return tf.gather(table._get() if mirrored else table, indices)


def lookup(table: tf.Variable, indices: tf.Tensor) -> tf.Tensor:
    """Returns rows of `table`: as `take_rows` does, or through the lookup that is set for it.

    Args:
        table: [rows, ...], a variable's `value`.
        indices: Integers of any shape; the result's shape begins with it.
    """
    return getattr(table, _LOOKUP, lambda indices: take_rows(table, indices))(indices)


@contextlib.contextmanager
def looked_up_by(
    lookups: Iterable[tuple[tf.Variable, Callable[[tf.Tensor], tf.Tensor]]],
) -> Iterator[None]:
    """Returns a context in which `lookup` calls, for each table given, the function beside it."""
    lookups = list(lookups)
    for table, function in lookups:
        setattr(table, _LOOKUP, function)
    try:
        yield
    finally:
        for table, _ in lookups:
            delattr(table, _LOOKUP)
