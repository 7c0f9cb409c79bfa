"""Model bundles: a folder that says all that is needed to use a trained model.

  NAME.safetensors   weights, and for an encoder its learned states
  NAME.json          what the model is, the vocabulary's hash, provenance, metrics
  vocab.txt          the vocabulary, one token a line

NAME is `encoder` (written by pretraining) or `classifier` (by fine-tuning). No pickle: loading
one executes nothing, and needs nothing of the run that wrote it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from data_pipelines.errors import InputError
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.states import LearnedState

FORMAT_VERSION = 1
STATES = ("learned", "mean")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
      tensors: name -> float32 array.
      info: what NAME.json holds.
    """

    tensors: dict[str, np.ndarray]
    info: dict[str, Any]

    def state(self, name: str) -> LearnedState:
        """Returns the learned state `name`, one of STATES."""
        return LearnedState(self.tensors[f"states/{name}/h"], self.tensors[f"states/{name}/c"])


def encoder_variables(encoder: Encoder) -> dict[str, keras.Variable]:
    """Returns the encoder's weights under their names in a bundle."""
    cell = encoder.lstm.cell
    return {
        "embeddings": encoder.embeddings,
        "lstm/kernel": cell.kernel,
        "lstm/recurrent_kernel": cell.recurrent_kernel,
        "lstm/bias": cell.bias,
    }


def classifier_variables(classifier: Classifier) -> dict[str, keras.Variable]:
    """Returns the classifier's weights under their names in a bundle."""
    variables = encoder_variables(classifier.encoder)
    variables["initial_state/h"] = classifier.encoder.initial_h
    variables["initial_state/c"] = classifier.encoder.initial_c
    for name, layer in (("hidden", classifier.hidden), ("output", classifier.output_layer)):
        variables[f"{name}/kernel"] = layer.kernel
        variables[f"{name}/bias"] = layer.bias
    if classifier.reader is not None:
        reader = encoder_variables(classifier.reader)
        reader["initial_state/h"] = classifier.reader.initial_h
        reader["initial_state/c"] = classifier.reader.initial_c
        variables.update({f"reader/{name}": variable for name, variable in reader.items()})
    return variables


def values(variables: Mapping[str, keras.Variable]) -> dict[str, np.ndarray]:
    """Returns what the variables hold."""
    return {name: np.asarray(variable.numpy()) for name, variable in variables.items()}


def assign(variables: Mapping[str, keras.Variable], tensors: Mapping[str, np.ndarray]) -> None:
    """Sets each variable to the tensor of its name.

    Raises:
      InputError: a tensor is missing or has another shape.
    """
    for name, variable in variables.items():
        if name not in tensors:
            raise InputError(f"the bundle holds no tensor {name!r}; it holds {sorted(tensors)}")
        if tuple(tensors[name].shape) != tuple(variable.shape):
            raise InputError(
                f"the bundle's tensor {name!r} is {tuple(tensors[name].shape)}, "
                f"but the model's is {tuple(variable.shape)}"
            )
        variable.assign(tensors[name])


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 (hex) of the tensors: names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def save(
    folder: Path,
    name: str,
    tensors: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    vocab_path: Path,
) -> None:
    """Writes a bundle beside `folder` and renames it to there, replacing what was there."""
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    info = {
        "format": f"warmstate-{name}",
        "format_version": FORMAT_VERSION,
        **info,
        "tensors_sha256": digest(tensors),
    }
    (beside / f"{name}.safetensors").write_bytes(safetensors.numpy.save(dict(tensors)))
    (beside / f"{name}.json").write_text(json.dumps(info, indent=2) + "\n")
    shutil.copyfile(vocab_path, beside / "vocab.txt")
    replace_folder(beside, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Flushes the files of `new` to disk and renames it to `folder`, which may exist."""
    for path in [*new.iterdir(), new]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_info(folder: Path, name: str, flag: str) -> dict[str, Any]:
    """Returns what a bundle says of itself, without reading its tensors.

    Args:
      flag: the flag that named the folder, for the error.

    Raises:
      InputError: there is no such bundle, or not of this name or format.
    """
    path = folder / f"{name}.json"
    try:
        info = json.loads(path.read_text())
        known = (info["format"], info["format_version"]) == (f"warmstate-{name}", FORMAT_VERSION)
    except OSError as error:
        raise InputError(f"{flag}={folder} is no {name} bundle: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag}={folder}: {path} is damaged: {error!r}") from None
    if not known:
        raise InputError(
            f"{flag}={folder}: {path} says format {info['format']!r} version "
            f"{info['format_version']!r}; this program reads version {FORMAT_VERSION}"
        )
    return info


def load(folder: Path, name: str, flag: str) -> Bundle:
    """Returns the bundle in `folder`.

    Raises:
      InputError: it is not there, or its tensors are damaged.
    """
    info = read_info(folder, name, flag)
    path = folder / f"{name}.safetensors"
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{flag}={folder}: cannot read {path}: {error}") from None
    if digest(tensors) != info.get("tensors_sha256"):
        raise InputError(f"{flag}={folder}: {path} is damaged: its SHA-256 is not {name}.json's")
    return Bundle(tensors, info)
