"""--stage=pretrain: trains an autoencoder or language model, and writes an encoder bundle."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from data_pipelines.batches.batch_plan import BatchPlan, PackedPlan
from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import RESERVED
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from trainer import states
from trainer.config import Config
from trainer.distribution.over_batches import gather_rows, sum_over_batches
from trainer.distribution.variables import digest, values_of
from trainer.models import bundle
from trainer.models.bag_autoencoder import BagAutoencoder
from trainer.models.classifier import pooled
from trainer.models.encoder import Encoder, Initial, LearnedState, dropped_weights, token_mask
from trainer.models.language_model import LanguageModel
from trainer.models.sequence_autoencoder import SequenceAutoencoder, same_rows
from trainer.models.text_model import Noise, TextModel
from trainer.stages.init_embeddings import init_embeddings
from trainer.training import loop, seeds
from trainer.training.run import Run, StoreBatches
from trainer.training.task import LossSum, Task

OBJECTIVES = {
    "sequence_autoencoder": SequenceAutoencoder,
    "language_model": LanguageModel,
    "bag_autoencoder": BagAutoencoder,
}


def pretraining_splits(store: TokenStore) -> list[str]:
    """Returns the splits of `store` with training text, labelled or not."""
    return [name for name in ("train", "unsupervised") if name in store.splits]


def pretrain(run: Run, folder: Path) -> dict[str, Any]:
    """Trains the model of the objective in `folder` and writes the bundle `folder`/encoder.

    Returns:
        For the report: steps, tokens_per_second, seconds, and the validation metrics.
    """
    config = run.config
    model, task, batches, report = set_up(run, folder)
    result = loop.train(run, task, batches)
    run.log("pretrain: averaging the final state over the corpus")
    averaged = run.some_documents(
        corpus(run).pieces(config.pretrain_max_tokens),
        config.mean_state_documents,
        config.pretrain_batch_size,
        config.pretrain_max_tokens,
    )
    mean = states.mean(run.distributor, model.encoder, averaged, run.stop_request)
    code = code_kernel(run, model, averaged) if isinstance(model, BagAutoencoder) else None
    report |= {
        "steps": config.pretrain_steps,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        **result.metrics,
    }
    if config.reconstruct_documents:
        report["exact_match_percent"] = exact_match_percent(run, model)
    if run.is_chief:
        encoder_sha256 = save_encoder(run, folder / "encoder", model, mean, code, report)
        if isinstance(model, SequenceAutoencoder):
            save_decoder(run, folder / "decoder", model, encoder_sha256)
        run.saved()
    return report


def set_up(run: Run, folder: Path) -> tuple[TextModel, Task, StoreBatches, dict[str, Any]]:
    """Returns the model at its start, what is trained, on what, and the report so far.

    Raises:
        InputError: There are fewer documents than --pretrain_documents, or fewer rows to carry on
            than model replicas.
    """
    config = run.config
    view, plan = rows_and_order(run, corpus(run))
    with run.distributor.scope():
        encoder = make_encoder(config, run.store.vocab_size, config.pretrain_embedding_scale)
        model = make_objective(run, encoder)
        carried = carried_state(run, model)
    report: dict[str, Any] = {}
    if config.init_embeddings:
        report["init_embeddings"] = init_embeddings(run, model.encoder)
    run.log(
        f"pretrain: {view.num_tokens:,} tokens in {len(view):,} documents or pieces, "
        f"{plan.steps_per_epoch:,} steps an epoch, {config.pretrain_steps:,} steps to do"
    )
    run.log_shapes("pretrain", plan)
    validation = validation_pieces(run, config.pretrain_evaluate_documents)
    task = Task(
        name="pretrain",
        folder=folder,
        stage=config.of_stage("pretrain"),
        variables=trained_variables(model),
        loss_sum=loss_sum(model, config),
        evaluate=evaluation(run, model, validation),
        inputs={"--store": run.store.sha256},
        ranked_by="nats_per_token",
        carried=carried,
    )
    return model, task, run.batches(view, plan), report


def make_objective(run: Run, encoder: Encoder) -> TextModel:
    """Returns a new model of --pretrain_objective on `encoder`.

    Call it in the scope. A collective: only the chief counts words.
    """
    config = run.config
    tied = config.tied_softmax
    if config.pretrain_objective != "bag_autoencoder":
        model: TextModel = OBJECTIVES[config.pretrain_objective](encoder, tied=tied)
        model.build()
        return model
    bag_model = BagAutoencoder(encoder, tied=tied, bag_weight=config.pretrain_bag_weight)
    bag_model.build()
    counted = None
    if run.is_chief:
        view = run.store.split(*pretraining_splits(run.store))
        counts = view.document_counts(run.store.vocab_size)
        counts[: len(RESERVED)] = 0
        counted = {"counts": counts, "documents": np.array(len(view))}
    counted = run.distributor.broadcast_arrays(counted)
    bag_model.set_idf(counted["counts"], int(counted["documents"]))
    return bag_model


def corpus(run: Run) -> SplitView:
    """Returns the training text, or --pretrain_documents of it."""
    view = run.store.split(*pretraining_splits(run.store))
    wanted = run.config.pretrain_documents
    if wanted > len(view):
        raise InputError(
            f"--pretrain_documents={wanted} is more than the {len(view)} documents that the store "
            "has for pretraining; 0 takes all"
        )
    return directed(run, view.sample(wanted, run.config.seed) if wanted else view)


def directed(run: Run, view: SplitView) -> SplitView:
    """Returns the documents in the order of --pretrain_direction."""
    return view.reversed() if run.config.pretrain_direction == "backward" else view


def validation_pieces(run: Run, documents: int) -> tf.data.Dataset:
    """Returns batches of about `documents` validation pieces, the same ones at every call."""
    config = run.config
    return run.some_documents(
        directed(run, run.store.split("validation")).pieces(config.pretrain_max_tokens),
        documents,
        config.pretrain_batch_size,
        config.pretrain_max_tokens,
    )


def rows_and_order(run: Run, documents: SplitView) -> tuple[SplitView, BatchPlan | PackedPlan]:
    """Returns the documents in rows of at most --pretrain_max_tokens, and their order."""
    config = run.config
    max_tokens, batch_size = config.pretrain_max_tokens, config.pretrain_batch_size
    if config.pretrain_packing != "none":
        return documents, PackedPlan(
            documents,
            max_tokens=max_tokens,
            global_batch=batch_size,
            seed=config.seed,
            carried=config.pretrain_packing == "stream",
        )
    view = documents.pieces(max_tokens)
    tokens_per_batch = config.pretrain_tokens_per_batch
    return view, run.plan(view, batch_size, max_tokens, tokens_per_batch=tokens_per_batch)


def make_encoder(
    config: Config, vocab_size: int, embedding_scale: float = 0.05, normalised: bool = False
) -> Encoder:
    """Returns a new encoder, its weights drawn from the run's seed; call it in the scope."""
    encoder = Encoder(
        vocab_size,
        config.embedding_dim,
        config.units,
        seed=config.seed,
        initial=Initial(config.memory_steps, embedding_scale),
        num_layers=config.num_layers,
        normalised=normalised,
        precision=config.precision,
        name="encoder",
    )
    for lstm in encoder.lstms:
        lstm.recompute = config.recompute
    encoder.build()
    return encoder


def carried_state(run: Run, model: TextModel) -> keras.Variable | None:
    """Returns the state that --pretrain_packing=stream carries for each row, or None.

    Every process holds it for all rows of the global batch: it is small compared with the
    gradients, and a run may then resume on any number of workers. Call it in the scope.
    """
    config, shards = run.config, run.distributor.num_shards
    if config.pretrain_packing != "stream":
        return None
    if config.pretrain_batch_size < shards:
        raise InputError(
            f"--pretrain_batch_size={config.pretrain_batch_size} with --pretrain_packing=stream: "
            f"each of the {shards} model replicas needs a row"
        )
    shape = (config.pretrain_batch_size, model.carried_size)
    return keras.Variable(np.zeros(shape, np.float32), trainable=False, name="carried")


def trained_variables(model: TextModel) -> dict[str, keras.Variable]:
    """Returns the trained variables, with the learned initial state."""
    return {
        **bundle.encoder_variables(model.encoder),
        **bundle.initial_state_variables(model.encoder),
        **bundle.decoder_variables(model),
    }


def loss_sum(model: TextModel, config: Config) -> LossSum:
    """Returns the training loss: sampled softmax, dropout."""

    def of_rows(
        rows: dict[str, tf.Tensor], step: tf.Tensor, shard: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        noise = Noise(
            dropout_rate=config.pretrain_dropout,
            embedding_seed=seeds.fold(config.seed, seeds.EMBEDDING_DROPOUT, step, shard),
            output_seed=seeds.fold(config.seed, seeds.OUTPUT_DROPOUT, step, shard),
            word_dropout_rate=config.pretrain_word_dropout,
            word_seed=seeds.fold(config.seed, seeds.WORD_DROPOUT, step, shard),
            subsampling=config.pretrain_subsampling,
            subsampling_seed=seeds.fold(config.seed, seeds.SUBSAMPLING, step, shard),
            num_sampled=config.sampled_softmax,
            softmax_seed=seeds.fold(config.seed, seeds.SOFTMAX_CANDIDATES, step),
        )
        seed = seeds.fold(config.seed, seeds.RECURRENT_WEIGHT_DROPOUT, step)
        with dropped_weights([model.encoder], config.recurrent_weight_dropout, seed):
            return model.loss_sum(rows, training=True, noise=noise)

    return of_rows


def evaluation(
    run: Run, model: TextModel, batches: tf.data.Dataset
) -> Callable[[], dict[str, float]]:
    """Returns a collective that gives the model's metrics and the perplexity over `batches`.

    Every document or piece starts from the encoder's initial state, also with carried states.
    """
    names: list[str] = []  # known once `sums` was traced

    def sums(rows: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        measured = model.measured(rows)
        names[:] = measured
        return [part for pair in measured.values() for part in pair]

    total = sum_over_batches(run.distributor, sums, batches, run.stop_request)

    def evaluated() -> dict[str, float]:
        values = total()
        found = {
            name: float(value / divisor)
            for name, value, divisor in zip(names, values[::2], values[1::2], strict=True)
        }
        return found | {"perplexity": math.exp(min(found["nats_per_token"], 50.0))}

    return evaluated


def exact_match_percent(run: Run, model: SequenceAutoencoder) -> float:
    """Returns the percentage of --reconstruct_documents that are reconstructed exactly.

    A collective. Greedy decoding, up to the end token.
    """

    def sums(rows: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        written, _ = model.reconstruct(
            rows["tokens"], rows["lengths"], run.config.pretrain_max_tokens
        )
        exact = tf.cast(same_rows(written, rows["tokens"]), tf.float32)
        return tf.reduce_sum(exact * rows["weights"]), tf.reduce_sum(rows["weights"])

    pieces = validation_pieces(run, run.config.reconstruct_documents)
    exact, count = sum_over_batches(run.distributor, sums, pieces, run.stop_request)()
    return float(100 * exact / count)


def code_kernel(run: Run, model: BagAutoencoder, documents: tf.data.Dataset) -> np.ndarray:
    """Returns the model's code kernel, its axes those of `documents`. A collective."""

    def mean_outputs(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        outputs, states = model.encoder(rows["tokens"], rows["lengths"])
        mask = token_mask(rows["tokens"], rows["lengths"])
        return pooled("mean", outputs, states[-1][0], mask)

    return model.code_kernel(
        gather_rows(run.distributor, mean_outputs, documents, run.stop_request)
    )


def save_encoder(
    run: Run,
    folder: Path,
    model: TextModel,
    mean: list[LearnedState],
    code: np.ndarray | None,
    metrics: dict[str, Any],
) -> str:
    """Writes the encoder bundle: weights, both states, a code's kernel, and their provenance.

    Returns:
        The digest of its tensors.
    """
    encoder = model.encoder
    tensors = values_of(bundle.encoder_variables(encoder))
    if code is not None:
        tensors[bundle.CODE_KERNEL] = code
    tensors |= bundle.state_tensors("learned", states.learned(encoder))
    tensors |= bundle.state_tensors("mean", mean)
    info = {
        "model": bundle.encoder_model(encoder),
        "tokenizer": run.store.tokenizer_config,
        "vocab_sha256": run.store.vocab_sha256,
        "objective": run.config.pretrain_objective,
        "direction": run.config.pretrain_direction,
        "trained_on": run.store.note or run.store.manifest["source"],
        "metrics": metrics,
        "config": dataclasses.asdict(run.config),
        "tensorflow_version": tf.__version__,
    }
    bundle.save(folder, "encoder", tensors, info, run.store.vocab_path)
    run.log(f"pretrain: wrote {folder}")
    return digest(tensors)


def save_decoder(run: Run, folder: Path, model: SequenceAutoencoder, encoder_sha256: str) -> None:
    """Writes the decoder bundle, which inference/reconstruct.py needs besides the encoder's."""
    sizes = {size: getattr(model.encoder, size) for size in bundle.MODEL_SIZES["decoder"]}
    info = {
        "model": {**sizes, "tied": model.tied},
        "encoder_sha256": encoder_sha256,
        "vocab_sha256": run.store.vocab_sha256,
    }
    tensors = values_of(bundle.decoder_variables(model))
    bundle.save(folder, "decoder", tensors, info, run.store.vocab_path)
