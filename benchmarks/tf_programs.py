"""What TensorFlow does of the benchmarks, ours and the straightforward Keras way; see processes.py.

Each class is one program; its public methods answer requests.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import answer_requests, peak_megabytes
from data_pipelines.quiet_tensorflow import import_quietly

import_quietly()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from trainer.training.task import Task  # noqa: E402
from trainer.training.train_step import TrainStep as Step  # noqa: E402

BASE_MEGABYTES = peak_megabytes()


def read_batches(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns [(tokens [batch, time], lengths [batch])] from a file."""
    with np.load(path) as held:
        count = len(held.files) // 2
        return [(held[f"tokens_{i}"], held[f"lengths_{i}"]) for i in range(count)]


class TrainStep:
    """Steps of pretraining on batches from a file."""

    def __init__(self) -> None:
        self._next = 0

    def step(self) -> list[float]:
        """Returns the seconds of a step, its real tokens and its loss."""
        tokens, lengths = self._batches[self._next % len(self._batches)]
        self._next += 1
        began = time.perf_counter()
        loss = self._train(tokens, lengths)
        return [time.perf_counter() - began, int(lengths.sum()), loss]

    def memory(self) -> float:
        return peak_megabytes()

    def base_memory(self) -> float:
        return BASE_MEGABYTES


class OurTrainStep(TrainStep):
    """The step of `--stage=pretrain`."""

    def native(self) -> bool:
        from trainer import native

        return native.operations(training=True) is not None

    def load(self, path: str, vocab: int, dim: int, units: int, sampled: int) -> str:
        from tests import loop_settings
        from trainer.config import Config
        from trainer.distribution.tf_distribute import one_device
        from trainer.models.sequence_autoencoder import SequenceAutoencoder
        from trainer.stages.pretrain import loss_sum, make_encoder, trained_variables
        from trainer.training.optimizer import Optimizer

        self._batches = read_batches(path)
        config = Config(vocab_size=vocab, embedding_dim=dim, units=units, sampled_softmax=sampled)
        distributor = one_device()
        with distributor.scope():
            model = SequenceAutoencoder(make_encoder(config, vocab))
            model.build()
            variables = trained_variables(model)
        stage = loop_settings.stage(steps=1_000, learning_rate=1e-3)
        optimizer = Optimizer("adam", stage, variables, distributor)
        task = Task("pretrain", Path(), stage, variables, loss_sum(model, config), dict)
        spec = self._batch(*self._batches[0], 0)
        dataset = tf.data.Dataset.from_tensors(spec).map(_of_any_size)
        self._step = Step(task, loop_settings.config(), distributor, optimizer, dataset)
        return tf.__version__

    def _batch(self, tokens: np.ndarray, lengths: np.ndarray, step: int) -> dict[str, tf.Tensor]:
        rows = len(lengths)
        return {
            "tokens": tf.constant(tokens),
            "lengths": tf.constant(lengths),
            "labels": tf.zeros([rows], tf.int32),
            "weights": tf.ones([rows]),
            "row_starts": tf.constant([0, rows]),
            "step": tf.constant(step, tf.int64),
        }

    def _train(self, tokens: np.ndarray, lengths: np.ndarray) -> float:
        batch = self._batch(tokens, lengths, self._next)
        outcome = self._step(batch, tf.constant(0.0))
        outcome.norms.numpy()
        return float(outcome.loss)


def _of_any_size(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Returns the batch with a shape in which only the number of axes is known."""
    return {
        name: tf.ensure_shape(
            tf.py_function(lambda x: x, [tensor], tensor.dtype),
            [2] if name == "row_starts" else [None] * len(tensor.shape),
        )
        for name, tensor in batch.items()
    }


class KerasTrainStep(TrainStep):
    """What one writes with Keras first: LSTM layers, a dense softmax, `train_on_batch`."""

    def load(self, path: str, vocab: int, dim: int, units: int, sampled: int) -> str:
        del sampled  # Keras has no sampled softmax
        self._batches = read_batches(path)
        layers = keras.layers
        tokens = keras.Input((None,), dtype="int32")
        before = keras.Input((None,), dtype="int32")  # what is written, one word late
        embed = layers.Embedding(vocab, dim, mask_zero=True)
        lstm = layers.LSTM(units, return_sequences=True, return_state=True)
        _, h, c = lstm(embed(tokens))
        written, _, _ = lstm(embed(before), initial_state=[h, c])
        self._model = keras.Model([tokens, before], layers.Dense(vocab)(written))
        self._model.compile(
            keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return keras.__version__

    def _train(self, tokens: np.ndarray, lengths: np.ndarray) -> float:
        before = np.pad(tokens, ((0, 0), (1, 0)), constant_values=2)[:, :-1]
        shown = np.arange(tokens.shape[1])[None] < lengths[:, None]
        return float(
            self._model.train_on_batch([tokens, before * shown], tokens, sample_weight=shown)
        )


class Predict:
    """Classes of raw texts from a file, one a line."""

    def _read(self, path: str) -> list[str]:
        return Path(path).read_text(encoding="utf-8").splitlines()

    def load(self, folder: str, texts: str, vocab: int, dim: int, units: int, most: int) -> str:
        del vocab, dim, units, most  # the bundle knows
        from trainer import native
        from trainer.inference.text_classifier import load_classifier

        native.use_in_inference()  # as --stage=predict does

        self._texts = self._read(texts)
        self._classifier = load_classifier(folder)
        return tf.__version__

    def seconds(self) -> float:
        began = time.perf_counter()
        self._classifier.probabilities(self._texts)
        return time.perf_counter() - began


class KerasPredict(Predict):
    """What one writes with Keras first: TextVectorization, layers, `predict`."""

    def load(self, folder: str, texts: str, vocab: int, dim: int, units: int, most: int) -> str:
        self._texts = tf.constant(self._read(texts))
        words = (Path(folder) / "vocab.txt").read_text(encoding="utf-8").splitlines()
        vectorize = keras.layers.TextVectorization(
            standardize="lower_and_strip_punctuation", output_sequence_length=most
        )
        vectorize.set_vocabulary(sorted({w for w in words if w.isalnum()}))
        text = keras.Input((), dtype="string")
        embedded = keras.layers.Embedding(vocab, dim, mask_zero=True)(vectorize(text))
        last = keras.layers.LSTM(units)(embedded)
        hidden = keras.layers.Dense(30, activation="relu")(last)
        outputs = keras.layers.Dense(1, activation="sigmoid")(hidden)
        self._model = keras.Model(text, outputs)
        return keras.__version__

    def seconds(self) -> float:
        began = time.perf_counter()
        self._model.predict(self._texts, batch_size=64, verbose=0)
        return time.perf_counter() - began


PROGRAMS: dict[str, Any] = {
    "train_step": OurTrainStep,
    "keras_train_step": KerasTrainStep,
    "predict": Predict,
    "keras_predict": KerasPredict,
}

if __name__ == "__main__":
    served = PROGRAMS[sys.argv[1]]()
    names = [name for name in dir(served) if not name.startswith("_")]
    answer_requests({name: getattr(served, name) for name in names})
