"""Model bundles: folders with all that is needed to use a trained model.

  NAME.safetensors   weights, and for an encoder its learned states
  NAME.json          the model's sizes, the vocabulary's hash, provenance, metrics
  vocab.txt          the vocabulary, a token on each line

NAME is `encoder` or `decoder` (from pretraining; a decoder is the softmax of a sequence
autoencoder, for use with its encoder), `classifier` (from fine-tuning) or `task` (from fine-tuning
with a frozen encoder). A task is an initial state, a head, and biases if they were trained, for use
with its encoder; it has no vocab.txt. Loading executes no code (no pickle) and does not need the
run's other files. Bundles may be untrusted: loading reads nothing outside of the folder, and checks
every size before it allocates memory.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from data_pipelines.durable import Buffer, write_folder
from data_pipelines.errors import InputError
from trainer.distribution.variables import assign, digest, values_of
from trainer.models.bag_autoencoder import BagAutoencoder
from trainer.models.classifier import POOLED_VECTORS, Classifier, num_outputs
from trainer.models.encoder import Encoder, LearnedState
from trainer.models.text_model import TextModel
from trainer.safe_files import (
    DamagedError,
    file_sha256,
    read_sealed,
    read_tensors,
    sealed,
    specs,
    tensor_parts,
)

FORMAT_VERSION = 4
# Of a bag autoencoder's encoder bundle, [units, embedding_dim]; see BagAutoencoder.code_kernel.
CODE_KERNEL = "code/kernel"
STATES = ("learned", "mean")
MAX_VOCAB_BYTES = 1 << 30
# The sizes in a bundle's "model", by the bundle's name.
MODEL_SIZES = {
    "encoder": ("vocab_size", "embedding_dim", "units", "num_layers"),
    "decoder": ("vocab_size", "embedding_dim", "units"),
    "classifier": (
        "vocab_size",
        "embedding_dim",
        "units",
        "num_layers",
        "hidden_units",
        "num_classes",
    ),
    "task": ("units", "num_layers", "hidden_units", "num_classes"),
}
HEADED = ("classifier", "task")  # bundles with a head


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        tensors: float32 arrays by name, also if the file has float16.
        info: The content of NAME.json.
    """

    tensors: dict[str, np.ndarray]
    info: dict[str, Any]

    def state(self, name: str) -> list[LearnedState]:
        """Returns the state `name`, one of STATES, of each layer.

        Raises:
            InputError: The bundle has no such state, or not for all layers.
        """
        names = [f"states/{name}/{layer}" for layer in range(self.info["model"]["num_layers"])]
        for part in (f"{layer}/{part}" for layer in names for part in "hc"):
            if part not in self.tensors:
                raise InputError(f"the bundle holds no tensor {part!r}: it has no state {name!r}")
        return [
            LearnedState(self.tensors[f"{layer}/h"], self.tensors[f"{layer}/c"]) for layer in names
        ]


def encoder_model(encoder: Encoder) -> dict[str, int]:
    """Returns the encoder's sizes, for a bundle's "model"."""
    return {size: getattr(encoder, size) for size in MODEL_SIZES["encoder"]}


def new_encoder(model: Mapping[str, Any], normalised: bool = False) -> Encoder:
    """Returns a built encoder of the sizes in a bundle's "model", to be followed by `assign`."""
    sizes = {size: model[size] for size in MODEL_SIZES["encoder"]}
    encoder = Encoder(**sizes, seed=0, normalised=normalised)
    encoder.build()
    return encoder


def encoder_of(loaded: Bundle) -> Encoder:
    """Returns the encoder of a bundle, with its learned state as initial state."""
    encoder = new_encoder(loaded.info["model"])
    states = initial_state_variables(encoder, "states/learned")
    assign(encoder_variables(encoder) | states, loaded.tensors)
    return encoder


def encoder_variables(encoder: Encoder) -> dict[str, keras.Variable]:
    """Returns the encoder's weights under their names in a bundle."""
    variables = {"embeddings": encoder.embeddings}
    for layer, lstm in enumerate(encoder.lstms):
        variables[f"lstm/{layer}/kernel"] = lstm.cell.kernel
        variables[f"lstm/{layer}/recurrent_kernel"] = lstm.cell.recurrent_kernel
        variables[f"lstm/{layer}/bias"] = lstm.cell.bias
    return variables


def initial_state_variables(
    encoder: Encoder, prefix: str = "initial_state"
) -> dict[str, keras.Variable]:
    """Returns the encoder's initial state under its names in a bundle."""
    return {
        f"{prefix}/{layer}/{part}": variable
        for layer, state in enumerate(encoder.initial_states)
        for part, variable in zip("hc", state, strict=True)
    }


def state_tensors(name: str, states: Sequence[LearnedState]) -> dict[str, np.ndarray]:
    """Returns the state `name`, a LearnedState for each layer, under its names in a bundle."""
    return {
        f"states/{name}/{layer}/{part}": np.asarray(value)
        for layer, state in enumerate(states)
        for part, value in zip("hc", state, strict=True)
    }


def decoder_variables(model: TextModel) -> dict[str, keras.Variable]:
    """Returns the weights with which the model predicts words, under their names in a bundle."""
    variables = {"softmax/kernel": model.softmax_kernel, "softmax/bias": model.softmax_bias}
    if isinstance(model, BagAutoencoder):
        variables |= {"bag/kernel": model.bag_kernel, "bag/bias": model.bag_bias}
    return variables


def new_classifier(model: Mapping[str, Any]) -> Classifier:
    """Returns a built classifier of the sizes in a bundle's "model", to be followed by `assign`."""

    def direction(backward: Classifier | None) -> Classifier:
        return Classifier(
            new_encoder(model, model["normalised"]),
            num_classes=model["num_classes"],
            hidden_units=model["hidden_units"],
            reader=new_encoder(model) if model["reads_first"] else None,
            pooling=model["pooling"],
            backward=backward,
            num_contexts=model.get("num_contexts", 0),
            multi_label=model.get("multi_label", False),
        )

    classifier = direction(direction(None) if model["bidirectional"] else None)
    classifier.build()
    return classifier


def classifier_model(classifier: Classifier) -> dict[str, Any]:
    """Returns a bundle's "model" for `new_classifier`."""
    return {
        **encoder_model(classifier.encoder),
        "hidden_units": 0 if classifier.hidden is None else classifier.hidden.units,
        "num_classes": classifier.num_classes,
        "reads_first": classifier.reader is not None,
        "pooling": classifier.pooling,
        "normalised": classifier.encoder.normalised,
        "bidirectional": classifier.backward is not None,
        **({"num_contexts": classifier.num_contexts} if classifier.num_contexts else {}),
        **({"multi_label": True} if classifier.multi_label else {}),
    }


def classifier_variables(classifier: Classifier) -> dict[str, keras.Variable]:
    """Returns the classifier's weights under their names in a bundle."""
    variables = encoder_variables(classifier.encoder)
    if classifier.encoder.normalised:
        variables["frequencies"] = classifier.encoder.frequencies
    variables |= initial_state_variables(classifier.encoder)
    for number, context in enumerate(classifier.contexts):
        variables[f"contexts/{number}/table"] = context.table
    for name, layer in (("hidden", classifier.hidden), ("output", classifier.output_layer)):
        if layer is not None:
            variables[f"{name}/kernel"] = layer.kernel
            variables[f"{name}/bias"] = layer.bias
    if classifier.reader is not None:
        reader = encoder_variables(classifier.reader) | initial_state_variables(classifier.reader)
        variables.update({f"reader/{name}": variable for name, variable in reader.items()})
    if classifier.backward is not None:
        backward = classifier_variables(classifier.backward)
        variables.update({f"backward/{name}": variable for name, variable in backward.items()})
    return variables


def task_tensors(classifier: Classifier, train: str) -> dict[str, np.ndarray]:
    """Returns what a task is besides its encoder, under its names in a bundle.

    Args:
        classifier: Of one direction, without a reader.
        train: What was trained, as --train says.
    """
    variables = classifier_variables(classifier)
    tensors = values_of(
        {
            name: variable
            for name, variable in variables.items()
            if name.startswith(("initial_state/", "hidden/", "output/"))
        }
    )
    if "bias" in train.split("+"):
        biases = classifier.encoder.biases()
        tensors |= {f"lstm/{layer}/bias": bias for layer, bias in enumerate(biases)}
    return tensors


def save(
    folder: Path,
    name: str,
    tensors: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    vocab_path: Path | None,
) -> None:
    """Writes a bundle to `folder` atomically, replacing an older one; a task has no vocabulary.

    Raises:
        InputError: The disk is full, or the folder cannot be written.
    """
    info = {
        "format": f"warmstate-{name}",
        "format_version": FORMAT_VERSION,
        **info,
        "tensors": specs(tensors),
        "tensors_sha256": digest(tensors),
    }
    files: dict[str, bytes | Sequence[Buffer]] = {f"{name}.safetensors": tensor_parts(tensors)}
    if vocab_path is not None:
        vocab = files["vocab.txt"] = vocab_path.read_bytes()
        info["vocab_file_sha256"] = hashlib.sha256(vocab).hexdigest()
    files[f"{name}.json"] = sealed(info)
    try:
        write_folder(folder.with_name(folder.name + ".new"), folder, files)
    except OSError as error:
        raise InputError(
            f"the {name} bundle {folder} cannot be written: {error.strerror}: make room or make it "
            "writable, and run the same command again: it continues from the checkpoints"
        ) from None


def read_info(folder: Path, name: str, flag: str) -> dict[str, Any]:
    """Returns the content of a bundle's NAME.json.

    Args:
        flag: The flag that names the folder, for errors.

    Raises:
        InputError: The bundle is missing, damaged, or of another name or format.
    """
    path = folder / f"{name}.json"
    if not path.is_symlink() and not path.exists():
        raise InputError(f"{flag}={folder} is no {name} bundle: {path} is missing")
    try:
        info = read_sealed(path)
    except DamagedError as error:
        raise InputError(f"{flag}={folder}: {error}") from None
    format_, version = info.get("format"), info.get("format_version")
    if (format_, version) != (f"warmstate-{name}", FORMAT_VERSION):
        raise InputError(
            f"{flag}={folder}: {path} says format {format_!r:.99} version {version!r:.99}; this "
            f"program reads warmstate-{name} version {FORMAT_VERSION}"
        )
    if fault := _info_fault(name, info):
        raise InputError(f"{flag}={folder}: {path} is damaged: {fault}")
    return info


def tokenizer_config(info: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the config of a bundle's tokenizer.

    Args:
        info: From `read_info`.
        where: Flag and folder, for errors.

    Raises:
        InputError: It is no object.
    """
    config = info.get("tokenizer")
    if not isinstance(config, dict):
        raise InputError(f"{where}: its 'tokenizer' is {config!r:.99}, not an object")
    return config


def _info_fault(name: str, info: Mapping[str, Any]) -> str | None:
    """Returns the first fault in the fields that this program reads, or None."""
    kinds: dict[str, type] = {
        "model": dict,
        "tensors": dict,
        "tensors_sha256": str,
        "vocab_sha256": str,
    }
    kinds |= {"max_tokens": int} if name in HEADED else {}
    kinds |= {} if name == "task" else {"vocab_file_sha256": str}
    kinds |= {"encoder_sha256": str} if name in ("decoder", "task") else {}
    for field, kind in kinds.items():
        if type(info.get(field)) is not kind:
            return f"{field!r} is {info.get(field)!r:.99}, not of type {kind.__name__}"
    model = info["model"]
    for size in MODEL_SIZES[name]:
        least = 0 if size == "hidden_units" else 1
        if type(model.get(size)) is not int or not least <= model[size] < 2**31:
            return f"the model's {size!r} is {model.get(size)!r:.99}"
    if name == "decoder" and type(model.get("tied")) is not bool:
        return f"the model's 'tied' is {model.get('tied')!r:.99}"
    for fact in ("reads_first", "normalised", "bidirectional") if name == "classifier" else ():
        if type(model.get(fact)) is not bool:
            return f"the model's {fact!r} is {model.get(fact)!r:.99}"
    if name in HEADED and model.get("pooling") not in (*POOLED_VECTORS,):
        return f"the model's 'pooling' is {model.get('pooling')!r:.99}"
    names, count = info.get("context_names", []), model.get("num_contexts", 0)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return f"'context_names' is {names!r:.99}, not a list of names"
    if type(count) is not int or not count == len(set(names)) == len(names):
        return f"the model's 'num_contexts' is {count!r:.99}, for {len(names)} 'context_names'"
    if count and not isinstance(info.get("context_key"), str):
        return f"'context_key' is {info.get('context_key')!r:.99}, not a name"
    if name in HEADED and not 0 < info["max_tokens"] < 2**31:
        return f"'max_tokens' is {info['max_tokens']}"
    return _thresholds_fault(name, info)


def _thresholds_fault(name: str, info: Mapping[str, Any]) -> str | None:
    """Returns a fault unless a multi-label classifier has a threshold for each class."""
    model, found = info["model"], info.get("thresholds", [])
    if model.get("multi_label", False) not in ((False, True) if name == "classifier" else (False,)):
        return f"the model's 'multi_label' is {model['multi_label']!r:.99}"
    wanted = model["num_classes"] if model.get("multi_label") else 0
    good = isinstance(found, list) and all(type(x) is float and 0 < x < 1 for x in found)
    if not good or len(found) != wanted:
        return f"'thresholds' is {found!r:.99}, not {wanted} probabilities"
    return None


def load(folder: Path, name: str, flag: str) -> Bundle:
    """Returns the bundle in `folder`.

    Raises:
        InputError: It is missing, a file of it is damaged, or its "model" does not fit its tensors.
    """
    info = read_info(folder, name, flag)
    try:
        tensors = read_tensors(folder / f"{name}.safetensors", info["tensors"])
        checked = [(f"{name}.safetensors", digest(tensors), "tensors_sha256")]
        if name != "task":
            vocab_sha256 = file_sha256(folder / "vocab.txt", MAX_VOCAB_BYTES)
            checked.append(("vocab.txt", vocab_sha256, "vocab_file_sha256"))
    except DamagedError as error:
        raise InputError(f"{flag}={folder}: {error}") from None
    for path, found, field in checked:
        if found != info[field]:
            raise InputError(
                f"{flag}={folder}: {folder / path} is damaged: its SHA-256 is not {name}.json's"
            )
    _check_model(name, info["model"], tensors, f"{flag}={folder}")
    for key, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{flag}={folder}: its tensor {key!r} has non-finite values")
    half = {name: array for name, array in tensors.items() if array.dtype == np.float16}
    return Bundle(tensors | {name: array.astype(np.float32) for name, array in half.items()}, info)


def _check_model(
    bundle_name: str, model: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> None:
    """Raises InputError if building the model would take more memory than its tensors."""
    for name, size in LARGE_TENSORS[bundle_name](model):
        found = tensors[name].size if name in tensors else 0
        if found != size:
            raise InputError(
                f"{where}: the model that it describes needs {size} numbers in the tensor "
                f"{name!r}; there are {found}"
            )


# These yield the names and sizes of a model's largest tensors, one by one: the claimed number of
# layers may be huge.


def _of_encoder(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    units = model["units"]
    yield "embeddings", model["vocab_size"] * model["embedding_dim"]
    for layer in range(model["num_layers"]):
        yield f"lstm/{layer}/kernel", 4 * units * (units if layer else model["embedding_dim"])
        yield f"lstm/{layer}/recurrent_kernel", 4 * units * units


def _of_decoder(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield "softmax/bias", model["vocab_size"]
    rows, width = model["vocab_size"], model["units"]
    if model["tied"]:
        rows, width = model["units"], model["embedding_dim"]
    yield "softmax/kernel", rows * width


def _of_head(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    outputs = num_outputs(model["num_classes"], model.get("multi_label", False))
    width, hidden_units = POOLED_VECTORS[model["pooling"]] * model["units"], model["hidden_units"]
    if hidden_units:
        yield "hidden/kernel", width * hidden_units
    yield "output/kernel", (hidden_units or width) * outputs


def _of_task(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    yield from _of_head(model)
    for layer in range(model["num_layers"]):
        yield f"initial_state/{layer}/h", model["units"]


def _of_classifier(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for direction in ("", "backward/") if model["bidirectional"] else ("",):
        for name, size in _of_head(model):
            yield f"{direction}{name}", size
        if model["normalised"]:
            yield f"{direction}frequencies", model["vocab_size"]
        if contexts := model.get("num_contexts", 0):
            for layer in range(model["num_layers"]):
                yield f"{direction}contexts/{layer}/table", contexts * 2 * model["units"]
        for encoder in ("", "reader/") if model["reads_first"] else ("",):
            for name, size in _of_encoder(model):
                yield f"{direction}{encoder}{name}", size


LARGE_TENSORS = {
    "encoder": _of_encoder,
    "decoder": _of_decoder,
    "classifier": _of_classifier,
    "task": _of_task,
}
