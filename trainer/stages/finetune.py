"""--stage=finetune: an encoder bundle and labelled text -> a supervised LSTM."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.store.split_view import SplitView
from trainer import states
from trainer.config import Config
from trainer.distribution.divergence import check_equal
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.text_model import TextModel
from trainer.stages.evaluate import error_and_loss
from trainer.stages.finetune_batches import FinetuneBatches
from trainer.stages.finetune_loss import loss_sum
from trainer.stages.init_embeddings import init_embeddings
from trainer.stages.pretrain import make_encoder, make_objective, pretraining_splits
from trainer.stages.run import Batches, Run
from trainer.training import loop
from trainer.training.optimizer import Rate
from trainer.training.task import Task
from trainer.variables import assign, digest, values_of

# Initializers take the run's seed plus less than this, for each layer of a stack anew.
BACKWARD_SEED = 500


def finetune(
    run: Run, folder: Path, encoder_folder: Path | None, init_weights: str, initial_state: str
) -> dict[str, Any]:
    """Trains a classifier in `folder` and writes the bundle `folder`/classifier.

    Args:
      encoder_folder: the encoder bundle; None where neither weights nor state come from one.
      init_weights: "encoder" or "random".
      initial_state: "zero", "mean", "learned" or "encode".

    Returns:
      For the report: steps, seconds, tokens_per_second, validation metrics, and for a warm
      start the broadcast: digests by worker, bytes, seconds.
    """
    config = run.config
    view = labelled_documents(run)
    plan = run.plan(view, config.finetune_batch_size, config.finetune_max_tokens)
    name = folder.name
    bidirectional = bool(config.backward_encoder) and encoder_folder is not None
    classifier = make_classifier(run, initial_state == "encode", bidirectional)
    if classifier.encoder.normalised:
        frequencies = word_frequencies(run)
        for direction in classifier.directions:
            direction.encoder.frequencies.assign(frequencies)
    report: dict[str, Any] = {"init_weights": init_weights, "initial_state": initial_state}
    if config.init_embeddings and init_weights == "random":
        for direction in classifier.directions:
            report["init_embeddings"] = init_embeddings(run, direction.encoder)
    encoders: dict[str, str] = {}
    if encoder_folder is not None:
        report["broadcast"], encoders = warm_start(
            run, classifier, encoder_folder, init_weights, initial_state
        )
    validation = run.all_documents(
        run.store.split("validation"), config.finetune_batch_size, config.finetune_max_tokens
    )
    run.log(
        f"{name}: {len(view):,} labelled documents, {plan.steps_per_epoch:,} steps an epoch, "
        f"{config.finetune_steps:,} steps to do; weights: {init_weights}, state: {initial_state}"
    )
    objective = joint_objective(run, classifier) if config.joint_weight else None
    batches = FinetuneBatches(run.batches(view, plan), unlabelled_documents(run))
    result = loop.train(
        Task(
            name="finetune",
            variables=trained_variables(classifier, initial_state) | softmax_variables(objective),
            loss_sum=loss_sum(config, classifier, objective),
            evaluate=error_and_loss(run, classifier, validation),
            rates=encoder_rates(config, classifier) if init_weights == "encoder" else {},
            select_by="error_percent",
            # One that this run trained itself is written again by each sitting: its mean state
            # differs in the last bits on another number of workers.
            encoders=encoders if config.encoder else {},
        ),
        run.settings("finetune", folder, plan.steps_per_epoch),
        run.distributor,
        batches,
        run.stop_request,
        run.log,
        run.vitals,
    )
    report |= {
        "labelled_documents": len(view),
        "steps": config.finetune_steps,
        "best_step": result.step,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "validation": result.metrics,
    }
    if run.is_chief:
        save_classifier(run, folder / "classifier", classifier, report)
    return report


def labelled_documents(run: Run) -> SplitView:
    """Returns the train split, or the part of it that --finetune_documents asks for."""
    view = run.store.split("train")
    wanted = run.config.finetune_documents
    return view.sample(wanted, run.config.seed) if wanted else view


def unlabelled_documents(run: Run) -> Batches | None:
    """Returns what reads --unlabelled_batch_size documents a step, None where that is 0."""
    batch_size, split = run.config.unlabelled_batch_size, "unsupervised"
    if not batch_size:
        return None
    view = run.store.split(split)
    return run.batches(view, run.plan(view, batch_size, run.config.finetune_max_tokens))


def word_frequencies(run: Run) -> np.ndarray:
    """Returns how often each word is in the text for training: float32 [vocab_size], sum 1.

    A collective; only the chief counts.
    """
    counted = None
    if run.is_chief:
        view = run.store.split(*pretraining_splits(run.store))
        counts = view.token_counts(run.store.vocab_size)
        counted = {"frequencies": (counts / counts.sum()).astype(np.float32)}
    return run.distributor.broadcast_arrays(counted)["frequencies"]


def make_classifier(run: Run, with_reader: bool, bidirectional: bool = False) -> Classifier:
    """Returns a new classifier, its weights drawn from the run's seed."""
    vocab_size = run.store.vocab_size

    def direction(config: Config, backward: Classifier | None = None) -> Classifier:
        return Classifier(
            make_encoder(config, vocab_size, normalised=config.normalises_embeddings),
            num_classes=run.store.num_classes,
            hidden_units=config.hidden_units,
            reader=make_encoder(config, vocab_size) if with_reader else None,
            pooling=config.pooling,
            backward=backward,
        )

    with run.distributor.scope():
        backward = None
        if bidirectional:
            other = dataclasses.replace(run.config, seed=run.config.seed + BACKWARD_SEED)
            backward = direction(other)
        classifier = direction(run.config, backward)
        classifier.build()
    return classifier


def warm_start(
    run: Run,
    classifier: Classifier,
    encoder_folder: Path,
    init_weights: str,
    initial_state: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Gives every worker the encoders' weights and states; only the chief reads them.

    Where the classifier has a second direction, that one's are from --backward_encoder.

    Returns:
      For the report: digests (SHA-256 of what each worker's variables then hold, by rank), bytes,
        seconds.
      The digests of the bundles, by flag.

    Raises:
      InputError: a bundle does not fit the model.
      DivergenceError: workers hold different bytes.
    """
    began = time.perf_counter()
    received, size = _received(run, encoder_folder, "--encoder")
    encoders = {"--encoder": received.info["tensors_sha256"]}
    held = _take_over(classifier, received, init_weights, initial_state)
    if classifier.backward is not None:
        folder = Path(run.config.backward_encoder)
        received, more = _received(run, folder, "--backward_encoder")
        size += more
        encoders["--backward_encoder"] = received.info["tensors_sha256"]
        theirs = _take_over(classifier.backward, received, init_weights, initial_state)
        held |= {f"backward/{name}": value for name, value in theirs.items()}
    digests = run.distributor.gather_objects(digest(held))
    if len(set(digests)) > 1:
        check_equal(run.distributor, held, "after the broadcast")  # raises, and says what differs
    seconds = time.perf_counter() - began
    run.log(
        f"finetune: broadcast {size / 1e6:.1f} MB to {len(digests)} workers in "
        f"{seconds:.2f} s; all hold {digests[0][:16]}"
    )
    return {"digests": digests, "bytes": size, "seconds": round(seconds, 3)}, encoders


def _received(run: Run, folder: Path, flag: str) -> tuple[bundle.Bundle, int]:
    """Returns the encoder bundle that the chief reads, in every process, and its bytes."""
    loaded = bundle.load(folder, "encoder", flag) if run.is_chief else None
    said = {name: loaded.info[name] for name in ("model", "tensors_sha256")} if loaded else None
    info = run.distributor.gather_objects(said)[0]
    tensors = run.distributor.broadcast_arrays(loaded.tensors if loaded else None)
    return bundle.Bundle(tensors, info), sum(array.nbytes for array in tensors.values())


def _take_over(
    classifier: Classifier, received: bundle.Bundle, init_weights: str, initial_state: str
) -> dict[str, np.ndarray]:
    """Sets one direction's variables from its encoder's bundle; returns what they then hold."""
    held: dict[str, np.ndarray] = {}
    if init_weights == "encoder":
        variables = bundle.encoder_variables(classifier.encoder)
        assign(variables, received.tensors)
        if classifier.encoder.normalised:
            classifier.encoder.absorb_normalisation()
        held |= values_of(variables)
    if initial_state in bundle.STATES:
        states.apply(classifier.encoder, received.state(initial_state))
        held |= values_of(bundle.initial_state_variables(classifier.encoder))
    if initial_state == "encode":
        reader = classifier.reader
        assert reader is not None  # whoever made this classifier knew the initial state
        variables = bundle.encoder_variables(reader)
        assign(variables, received.tensors)
        states.apply(reader, received.state("learned"))
        variables |= bundle.initial_state_variables(reader)
        held |= {f"reader/{name}": value for name, value in values_of(variables).items()}
    return held


def trained_variables(classifier: Classifier, initial_state: str) -> dict[str, keras.Variable]:
    """Returns what fine-tuning trains: all but the reader, and the state only if it is learned."""
    fixed = () if initial_state == "learned" else ("initial_state/",)
    return {
        name: variable
        for name, variable in bundle.classifier_variables(classifier).items()
        if not name.removeprefix("backward/").startswith(("reader/", "frequencies", *fixed))
    }


def joint_objective(run: Run, classifier: Classifier) -> TextModel:
    """Returns the model of --pretrain_objective on the classifier's encoder, its softmax new."""
    with run.distributor.scope():
        return make_objective(run, classifier.encoder)


def softmax_variables(objective: TextModel | None) -> dict[str, keras.Variable]:
    """Returns what fine-tuning trains of the objective beside the encoder; no bundle holds it."""
    if objective is None:
        return {}
    decoder = bundle.decoder_variables(objective)
    return {f"objective/{name}": variable for name, variable in decoder.items()}


def encoder_rates(config: Config, classifier: Classifier) -> dict[str, Rate]:
    """Returns the learning rates of the weights that come from the encoder, by layer.

    The head is above all; below it the LSTMs, then the embeddings. A learned state is not among
    them: it is trained as the head is.
    """
    encoder = bundle.encoder_variables(classifier.encoder)
    depth = {
        name: 1 + config.num_layers - (int(name.split("/")[1]) + 1 if "/" in name else 0)
        for name in encoder
    }
    rates = {
        name: Rate(
            config.encoder_rate * config.layer_rate**below,
            config.encoder_frozen_steps + config.unfreeze_every_steps * below,
        )
        for name, below in depth.items()
    }
    if classifier.backward is not None:
        rates |= {f"backward/{name}": rate for name, rate in rates.items()}
    return {name: rate for name, rate in rates.items() if rate != Rate(1.0, 0)}


def save_classifier(run: Run, folder: Path, classifier: Classifier, report: dict[str, Any]) -> None:
    """Writes the classifier bundle."""
    info = {
        "model": bundle.classifier_model(classifier),
        "max_tokens": run.config.finetune_max_tokens,
        "tokenizer": run.store.tokenizer_config,
        "vocab_sha256": run.store.vocab_sha256,
        "class_names": list(run.store.class_names),
        "report": report,
        "config": dataclasses.asdict(run.config),
        "tensorflow_version": tf.__version__,
    }
    tensors = values_of(bundle.classifier_variables(classifier))
    bundle.save(folder, "classifier", tensors, info, run.store.vocab_path)
    run.log(f"finetune: wrote {folder}")
