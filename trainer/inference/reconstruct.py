"""Reconstructs texts with a pretrained sequence autoencoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

from data_pipelines.errors import InputError
from data_pipelines.reserved_ids import END_ID
from trainer.distribution.variables import assign
from trainer.inference.text_classifier import bundle_tokenizer
from trainer.models import bundle
from trainer.models.sequence_autoencoder import SequenceAutoencoder

BATCH_SIZE = 64


class Reconstruction(NamedTuple):
    """A text and its reconstruction."""

    text: str
    read: str  # as the model read it: cut to its length, unknown words as <unk>
    written: str  # as the model wrote it
    exact: bool  # whether it wrote the same tokens as it read, including the end token


def reconstructor(
    encoder_folder: Path, max_tokens: int
) -> Callable[[Sequence[str]], list[Reconstruction]]:
    """Returns a function that reconstructs raw texts by greedy decoding.

    Args:
        encoder_folder: An encoder bundle from pretraining, with its decoder bundle beside it.
        max_tokens: Number of first tokens of a text to read, including the end token; at least 1.
            An autoencoder does well up to the --pretrain_max_tokens of its pretraining.

    Raises:
        InputError: A bundle is missing or damaged, the two are not from one model, or the encoder
            is not from an autoencoder.
    """
    loaded = bundle.load(encoder_folder, "encoder", "--encoder")
    model = load_autoencoder(encoder_folder, loaded)
    backward = loaded.info.get("direction") == "backward"
    tokenizer = bundle_tokenizer(encoder_folder, loaded.info, "--encoder")
    rewrite = tf.function(
        lambda tokens, lengths: model.reconstruct(tokens, lengths, max_tokens),
        input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)],
        autograph=False,
    )

    def reconstruct(texts: Sequence[str]) -> list[Reconstruction]:
        found = []
        for start in range(0, len(texts), BATCH_SIZE):
            some = list(texts[start : start + BATCH_SIZE])
            words = [row[:-1][: max_tokens - 1] for row in tokenizer.encode(some).to_list()]
            read = [[*(row[::-1] if backward else row), END_ID] for row in words]
            tokens = tf.ragged.constant(read, tf.int32)
            lengths = tf.cast(tokens.row_lengths(), tf.int32)
            written = tf.RaggedTensor.from_tensor(*rewrite(tokens.to_tensor(), lengths)).to_list()
            for text, given, made in zip(some, read, written, strict=True):
                rows = [[i for i in row if i != END_ID] for row in (given, made)]
                seen, again = (tokenizer.decode(r[::-1] if backward else r) for r in rows)
                found.append(Reconstruction(text, seen, again, exact=given == made))
        return found

    return reconstruct


def load_autoencoder(encoder_folder: Path, loaded: bundle.Bundle) -> SequenceAutoencoder:
    """Returns the autoencoder of an encoder bundle, `loaded`, and the decoder bundle beside it.

    Raises:
        InputError: As `reconstructor`.
    """
    objective = loaded.info.get("objective")
    if objective != "sequence_autoencoder":
        raise InputError(
            f"--encoder={encoder_folder}: it was pretrained with --pretrain_objective="
            f"{objective!s:.99}; only a sequence_autoencoder writes reconstructions"
        )
    folder = encoder_folder.with_name("decoder")
    decoder = bundle.load(folder, "decoder", "the decoder beside --encoder")
    if decoder.info["encoder_sha256"] != loaded.info["tensors_sha256"]:
        raise InputError(
            f"{folder} is not of the run of --encoder={encoder_folder}: it was trained with "
            f"another encoder (SHA-256 {decoder.info['encoder_sha256']:.12})"
        )
    model = SequenceAutoencoder(bundle.encoder_of(loaded), tied=decoder.info["model"]["tied"])
    model.build()
    assign(bundle.decoder_variables(model), decoder.tensors)
    return model
