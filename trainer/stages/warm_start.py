"""The hand-off: a classifier takes weights and states from an encoder bundle, on every worker."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from data_pipelines.errors import InputError
from trainer import states
from trainer.config import Config
from trainer.distribution.divergence import check_equal
from trainer.distribution.variables import assign, digest, values_of
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.training.run import Run


def warm_start(
    run: Run, classifier: Classifier, trained: Mapping[str, keras.Variable]
) -> tuple[dict[str, Any], dict[str, str], list[np.ndarray | None]]:
    """Gives every worker the weights and states of --encoder.

    Only the chief reads the bundle, and broadcasts it. Where --train freezes the encoder, every
    worker that has the bundle reads it, and the chief broadcasts the `trained` variables. A second
    direction gets the weights and states of --backward_encoder.

    Returns:
        For the report: digests (SHA-256 of each worker's variables afterwards, by rank), bytes,
        seconds; the digests of the bundles, by flag; and for each direction the kernel of its bag
        autoencoder's code, None if it is of another objective.

    Raises:
        InputError: A bundle does not fit the model.
        DivergenceError: Workers hold different bytes.
    """
    began = time.perf_counter()
    config = run.config
    read = _received if config.train == "all" else _read_by_all
    named = (
        ("--encoder", config.encoder, ""),
        ("--backward_encoder", config.backward_encoder, "backward/"),
    )
    size, encoders, codes = 0, {}, []
    held: dict[str, np.ndarray] = {}
    for direction, (flag, folder, prefix) in zip(classifier.directions(), named, strict=False):
        received, sent = read(run, Path(folder), flag)
        size += sent
        encoders[flag] = received.info["tensors_sha256"]
        codes.append(received.tensors.get(bundle.CODE_KERNEL))
        taken = _take_over(config, direction, received)
        held |= {prefix + name: value for name, value in taken.items()}
    if config.train != "all":
        of_chief = run.distributor.broadcast_arrays(values_of(trained))
        assign(trained, of_chief)
        size += sum(array.nbytes for array in of_chief.values())
        held |= of_chief
    digests = run.distributor.gather_objects(digest(held))
    if len(set(digests)) > 1:
        check_equal(run.distributor, held, "after the broadcast")  # raises, and names what differs
    seconds = time.perf_counter() - began
    run.log(
        f"finetune: broadcast {size / 1e6:.3g} MB to {len(digests)} workers in "
        f"{seconds:.2f} s; all hold {digests[0][:16]}"
    )
    broadcast = {"digests": digests, "bytes": size, "seconds": round(seconds, 3)}
    return broadcast, encoders, codes


def _received(run: Run, folder: Path, flag: str) -> tuple[bundle.Bundle, int]:
    """Returns the encoder bundle that the chief reads, in every process, and the bytes sent."""
    loaded = bundle.load(folder, "encoder", flag) if run.is_chief else None
    keys = ("model", "tensors_sha256")
    info = run.distributor.gather_objects({k: loaded.info[k] for k in keys} if loaded else None)[0]
    tensors = run.distributor.broadcast_arrays(loaded.tensors if loaded else None)
    return bundle.Bundle(tensors, info), sum(array.nbytes for array in tensors.values())


def _read_by_all(run: Run, folder: Path, flag: str) -> tuple[bundle.Bundle, int]:
    """Returns the encoder bundle that each process reads, and the bytes sent: none.

    Without a shared folder, where a worker has no such bundle, the chief's is broadcast.

    Raises:
        InputError: A worker has another bundle than the chief's.
    """
    if not all(run.distributor.gather_objects((folder / "encoder.json").exists())):
        return _received(run, folder, flag)
    loaded = bundle.load(folder, "encoder", flag)
    found = run.distributor.gather_objects(loaded.info["tensors_sha256"])
    if others := [rank for rank, sha256 in enumerate(found) if sha256 != found[0]]:
        raise InputError(
            f"{flag}={folder} is another bundle for workers {others} (SHA-256 "
            f"{found[others[0]][:12]}) than for the chief ({found[0][:12]}): copy the chief's to "
            "all workers"
        )
    return loaded, 0


def _take_over(
    config: Config, classifier: Classifier, received: bundle.Bundle
) -> dict[str, np.ndarray]:
    """Sets one direction's variables from its encoder's bundle; returns their new values."""
    held: dict[str, np.ndarray] = {}
    if config.init_weights == "encoder":
        variables = bundle.encoder_variables(classifier.encoder)
        assign(variables, received.tensors)
        if classifier.encoder.normalised:
            classifier.encoder.absorb_normalisation()
        held |= values_of(variables)
    if config.initial_state in bundle.STATES:
        states.apply(classifier.encoder, received.state(config.initial_state))
        held |= values_of(bundle.initial_state_variables(classifier.encoder))
    if config.initial_state == "encode":
        reader = classifier.reader
        assert reader is not None  # `make_classifier` reads the same flag
        variables = bundle.encoder_variables(reader)
        assign(variables, received.tensors)
        states.apply(reader, received.state("learned"))
        variables |= bundle.initial_state_variables(reader)
        held |= {f"reader/{name}": value for name, value in values_of(variables).items()}
    return held
