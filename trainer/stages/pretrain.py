"""--stage=pretrain: unlabelled text -> a sequence autoencoder -> an encoder bundle."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from data_pipelines.batch_plan import BatchPlan, PackedPlan
from data_pipelines.split_view import SplitView
from trainer import bundle, loop, seeds, states
from trainer.config import Config
from trainer.distribution.steps import sum_over_batches
from trainer.models.encoder import Encoder
from trainer.models.sequence_autoencoder import SequenceAutoencoder
from trainer.stages.run import Run

PRETRAINING_SPLITS = ("train", "unsupervised")


def pretrain(run: Run, folder: Path) -> dict[str, Any]:
    """Trains the autoencoder in `folder` and writes the bundle `folder`/encoder.

    Returns:
      For the report: steps, tokens_per_second, seconds, and the validation metrics.
    """
    config = run.config
    splits = [name for name in PRETRAINING_SPLITS if name in run.store.splits]
    view, plan = rows_and_order(run, *splits)
    with run.distributor.scope():
        model = SequenceAutoencoder(
            make_encoder(config, run.store.vocab_size, config.pretrain_embedding_scale),
            tied=config.tied_softmax,
        )
        model.build()
    validation = run.some_documents(
        corpus(run, "validation"),
        config.pretrain_evaluate_documents,
        config.pretrain_batch_size,
        config.pretrain_max_tokens,
    )
    run.log(
        f"pretrain: {view.num_tokens:,} tokens in {len(view):,} documents or pieces, "
        f"{plan.steps_per_epoch:,} steps an epoch, {config.pretrain_steps:,} steps to do"
    )
    result = loop.train(
        loop.Task(
            name="pretrain",
            variables=autoencoder_variables(model),
            loss_sum=loss_sum(model, config),
            evaluate=perplexity(run, model, validation),
            ranked_by="nats_per_token",
        ),
        run.settings("pretrain", folder, plan.steps_per_epoch),
        run.distributor,
        run.batches(view, plan),
        run.stop_request,
        run.log,
    )
    run.log("pretrain: averaging the final state over the corpus")
    averaged = run.some_documents(
        corpus(run, *splits),
        config.mean_state_documents,
        config.pretrain_batch_size,
        config.pretrain_max_tokens,
    )
    mean = states.mean(run.distributor, model.encoder, averaged, run.stop_request)
    report = {
        "steps": config.pretrain_steps,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        **result.metrics,
    }
    if run.is_chief:
        save_encoder(run, folder / "encoder", model.encoder, mean, report)
    return report


def corpus(run: Run, *splits: str) -> SplitView:
    """Returns the text of `splits`, in pieces of at most --pretrain_max_tokens."""
    return run.store.split(*splits).pieces(run.config.pretrain_max_tokens)


def rows_and_order(run: Run, *splits: str) -> tuple[SplitView, BatchPlan | PackedPlan]:
    """Returns the text of `splits` in rows of at most --pretrain_max_tokens, and its order."""
    config = run.config
    max_tokens, batch_size = config.pretrain_max_tokens, config.pretrain_batch_size
    if config.pretrain_packing == "concat":
        view = run.store.split(*splits)
        return view, PackedPlan(
            view, max_tokens=max_tokens, global_batch=batch_size, seed=config.seed
        )
    view = corpus(run, *splits)
    tokens_per_batch = config.pretrain_tokens_per_batch
    return view, run.plan(view, batch_size, max_tokens, tokens_per_batch=tokens_per_batch)


def make_encoder(config: Config, vocab_size: int, embedding_scale: float = 0.05) -> Encoder:
    """Returns a new encoder, its weights drawn from the run's seed; call it in the scope."""
    encoder = Encoder(
        vocab_size,
        config.embedding_dim,
        config.units,
        seed=config.seed,
        memory_steps=config.memory_steps,
        embedding_scale=embedding_scale,
        num_layers=config.num_layers,
        name="encoder",
    )
    encoder.build()
    return encoder


def autoencoder_variables(model: SequenceAutoencoder) -> dict:
    """Returns what pretraining trains, the learned initial state among it."""
    return {
        **bundle.encoder_variables(model.encoder),
        **bundle.initial_state_variables(model.encoder),
        "softmax/kernel": model.softmax_kernel,
        "softmax/bias": model.softmax_bias,
    }


def loss_sum(model: SequenceAutoencoder, config: Config) -> loop.LossSum:
    """Returns the training loss: sampled softmax, dropout."""

    def of_rows(rows: dict, step: tf.Tensor, shard: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return model.loss_sum(
            rows["tokens"],
            rows["lengths"],
            rows["weights"],
            training=True,
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

    return of_rows


def perplexity(
    run: Run, model: SequenceAutoencoder, batches: tf.data.Dataset
) -> Callable[[], dict[str, float]]:
    """Returns a collective that gives the exact nats a token and the perplexity over `batches`."""

    def sums(rows: dict) -> tuple[tf.Tensor, tf.Tensor]:
        return model.loss_sum(rows["tokens"], rows["lengths"], rows["weights"], training=False)

    total = sum_over_batches(run.distributor, sums, batches, run.stop_request)

    def evaluated() -> dict[str, float]:
        loss, tokens = total()
        nats = float(loss / tokens)
        return {"nats_per_token": nats, "perplexity": math.exp(min(nats, 50.0))}

    return evaluated


def save_encoder(
    run: Run, folder: Path, encoder: Encoder, mean: list[states.LearnedState], metrics: dict
) -> None:
    """Writes the encoder bundle: weights, both learned states, and where they are from."""
    tensors = bundle.values(bundle.encoder_variables(encoder))
    tensors |= bundle.state_tensors("learned", states.learned(encoder))
    tensors |= bundle.state_tensors("mean", mean)
    info = {
        "model": bundle.encoder_model(encoder),
        "tokenizer": run.store.tokenizer_config,
        "vocab_sha256": run.store.vocab_sha256,
        "trained_on": run.store.note or run.store.manifest["source"],
        "metrics": metrics,
        "config": dataclasses.asdict(run.config),
        "tensorflow_version": tf.__version__,
    }
    bundle.save(folder, "encoder", tensors, info, run.store.vocab_path)
    run.log(f"pretrain: wrote {folder}")
