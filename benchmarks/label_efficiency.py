"""Test error by number of labels: linear heads on frozen encoders, beside linear models of words.

    python -m benchmarks.label_efficiency --store=STORE --encoder=RUN/encoder --work=FOLDER

Each encoder reads every document once. Then a head is fitted to the mean outputs of some labelled
documents, as a warm start with --hidden_units=0 --pooling=mean --finetune_steps=0 does. Samples are
those of --label_counts: a sample of fewer labels is the start of a larger one. FOLDER keeps what is
done, so an interrupted run continues. Writes benchmarks/results/label_efficiency.json and
docs/label-efficiency.md.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags

from benchmarks import line_chart
from benchmarks.kept_runs import FINETUNED_AGAIN, tuned_and_tested
from benchmarks.machine import facts, in_words
from data_pipelines.permutation import Permutation
from data_pipelines.store.split_view import SAMPLE_KEY, SplitView
from data_pipelines.store.token_store import TokenStore
from trainer import native
from trainer.models import bundle
from trainer.models.classifier import pooled
from trainer.models.encoder import Encoder
from trainer.report_page.statistics import mean_of_runs
from trainer.reporting.report_file import MODELS
from trainer.stages.linear_head import fitted, self_trained
from trainer.stages.linear_models import LinearModels, labels_of

FLAGS = flags.FLAGS
COUNTS = {
    10: 5,
    50: 5,
    200: 5,
    1_000: 3,
    5_000: 3,
    0: 1,
}  # samples of each number of labels; 0: all
LINEAR = {name: MODELS[name] for name in ("tfidf", "nbsvm", "lsa")}
OBJECTIVES = {
    "bag_autoencoder": "bag autoencoder",
    "sequence_autoencoder": "sequence autoencoder",
    "language_model": "language model",
}
# The best of the frozen encoders, and its row when its head labels documents itself.
BEST, SELF_TRAINED = "language_model", "language_model_self_trained"
# Kept recipes that train the whole LSTM, by the start of their file's name in results/.
SCRATCH = "imdb_cpu_scratch"
FINETUNED = {
    SCRATCH: "LSTM from scratch",
    "imdb_cpu": "language model, fine-tuned",
    "imdb_cpu_sequence_autoencoder": "sequence autoencoder, fine-tuned",
    "imdb_cpu_autoencoder": "bag autoencoder, fine-tuned",
}
FINETUNED_FROM = {
    "language_model": "imdb_cpu",
    "sequence_autoencoder": "imdb_cpu_sequence_autoencoder",
    "bag_autoencoder": "imdb_cpu_autoencoder",
}
PAGE = Path("docs/label-efficiency.md")
PICTURE = Path("docs/images/label-efficiency.svg")
TEMPLATE = Path(__file__).with_name("label_efficiency.template.md")
RESULT = Path("benchmarks/results/label_efficiency.json")
BATCH_SIZE, MAX_TOKENS = 64, 400


def samples(train: SplitView) -> Iterator[tuple[int, int, SplitView]]:
    """Yields the number of labels, the sample's number, and the documents."""
    for count, draws in COUNTS.items():
        for draw in range(draws):
            yield count or len(train), draw, train.sample(count, draw) if count else train


def mean_outputs(encoder: Encoder, view: SplitView) -> np.ndarray:
    """Returns the mean of the encoder's outputs for each document: float32 [documents, units]."""

    @tf.function(reduce_retracing=True, autograph=False)
    def read(tokens: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        outputs, final = encoder(tokens, lengths)
        mask = tf.sequence_mask(lengths, tf.shape(tokens)[1])
        return pooled("mean", outputs, final[-1][0], mask)

    order = np.argsort(view.lengths_of(np.arange(len(view))), kind="stable")
    found = np.empty((len(view), encoder.units), np.float32)
    for start in range(0, len(order), BATCH_SIZE):
        documents = order[start : start + BATCH_SIZE]
        found[documents] = read(*view.gather(documents, MAX_TOKENS)).numpy()
    return found


class Heads:
    """Linear heads on a frozen encoder."""

    def __init__(self, folder: Path, store: TokenStore, work: Path):
        loaded = bundle.load(folder, "encoder", "--encoder")
        self.name = loaded.info["objective"]
        self._code = loaded.tensors.get(bundle.CODE_KERNEL)
        self._classes = store.num_classes
        cached = work / f"outputs-{loaded.info['tensors_sha256'][:16]}.npz"
        splits = ("train", "validation", "test")
        if not cached.exists():
            encoder = bundle.encoder_of(loaded)
            outputs = {split: mean_outputs(encoder, store.split(split)) for split in splits}
            np.savez(cached, **outputs)
        outputs = np.load(cached)
        self._outputs = {split: outputs[split] for split in splits}
        self._labels = {split: labels_of(store.split(split)) for split in splits}

    def errors(self, count: int, draw: int, trains_itself: bool = False) -> dict[str, float]:
        """Returns the errors, in percent, of the head of a sample of training documents."""
        truth = self._labels["train"]
        chosen = np.arange(len(truth))
        if count < len(truth):
            chosen = Permutation(len(truth), (draw, SAMPLE_KEY))(np.arange(count))
        outputs = self._outputs["train"]
        known = outputs[chosen], truth[chosen], self._classes, self._code
        kernel, bias = self_trained(*known, outputs) if trains_itself else fitted(*known)
        found = {}
        for split in ("validation", "test"):
            logits = self._outputs[split] @ kernel + bias
            predicted = logits.argmax(axis=1) if self._classes > 2 else logits[:, 0] > 0
            error = 100 * float(np.mean(predicted != self._labels[split]))
            found[f"{split}_error_percent"] = round(error, 3)
        return found


def measure(
    store: TokenStore, encoders: Sequence[Path], finetuned: Sequence[Path], work: Path
) -> list[dict[str, Any]]:
    """Returns a row for each model, number of labels and sample; rows in `work` are kept.

    Args:
        finetuned: Folders as `finetuned_row` reads them.
    """
    path = work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["model"], row["labels"], row["draw"]) for row in rows}
    new = [finetuned_row(folder) for folder in finetuned]
    rows += [row for row in new if (row["model"], row["labels"], row["draw"]) not in done]
    path.write_text(json.dumps(rows) + "\n")
    heads = {head.name: head for head in (Heads(each, store, work) for each in encoders)}
    linear = LinearModels(store)
    train = store.split("train")
    for count, draw, view in samples(train):
        names = [*linear.names, *heads]
        if BEST in heads and count < len(train):
            names.append(SELF_TRAINED)
        for name in names:
            if (name, count, draw) in done:
                continue
            if name in linear.names:
                errors = linear.errors(name, view).in_record()
            elif name == SELF_TRAINED:
                errors = heads[BEST].errors(count, draw, trains_itself=True)
            else:
                errors = heads[name].errors(count, draw)
            rows.append({"model": name, "labels": count, "draw": draw, **errors})
            path.write_text(json.dumps(rows) + "\n")
            print(f"{count:,} labels, sample {draw}: {name} {errors['test_error_percent']:.2f} %")
    return rows


def finetuned_row(folder: Path) -> dict[str, Any]:
    """Returns the row of a run in `folder`/finetune that is tested in `folder`/test."""
    tuned, tested = tuned_and_tested(folder)
    config = tuned["config"]
    is_scratch = config["init_weights"] == "random"
    return {
        "model": SCRATCH if is_scratch else FINETUNED_FROM[config["pretrain_objective"]],
        "draw": config["seed"],
        "labels": tuned["finetune"]["labelled_documents"],
        "test_error_percent": tested["test"]["error_percent"],
    }


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each run of FINETUNED that is kept in `folder`, all with all labels."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        name = path.stem.partition("-seed")[0]
        if name not in FINETUNED:
            continue
        result = json.loads(path.read_text())
        ((start, error),) = result["test_error_percent"].items()
        errors = [error, *(x["test"]["error_percent"] for x in result.get(FINETUNED_AGAIN, ()))]
        labels = result[start]["labelled_documents"]
        rows += [{"model": name, "labels": labels, "test_error_percent": each} for each in errors]
    return rows


def cell(errors: Sequence[float]) -> str:
    """Returns the mean of the samples, and half its 95 % interval if there are several."""
    if len(errors) < 2:
        return f"{errors[0]:.1f}" if errors else ""
    found = mean_of_runs(list(errors))
    return f"{found.value:.1f} ± {found.high - found.value:.1f}"


def errors_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Returns the test errors by title of the model and number of labels."""
    titles = LINEAR | {name: f"{title}, frozen" for name, title in OBJECTIVES.items()}
    titles |= {SELF_TRAINED: "language model, self-trained"} | FINETUNED
    found: dict[str, dict[int, list[float]]] = {title: {} for title in titles.values()}
    for row in rows:
        of_model = found[titles[row["model"]]]
        of_model.setdefault(row["labels"], []).append(row["test_error_percent"])
    return {title: by_count for title, by_count in found.items() if by_count}


def picture(result: Mapping[str, Any]) -> str:
    """Returns an SVG of the mean errors, a line each model."""
    lines = {
        title: [(count, statistics.mean(each)) for count, each in sorted(by_count.items())]
        for title, by_count in errors_of(result["rows"]).items()
    }
    counts = sorted({row["labels"] for row in result["rows"]})
    labels = ("labelled documents", "test error, percent")
    return line_chart.svg(lines, counts, (6, 8, 10, 15, 20, 30, 50), labels, x_is_logarithmic=True)


def page(result: Mapping[str, Any]) -> str:
    """Returns docs/label-efficiency.md."""
    errors = errors_of(result["rows"])
    counts = sorted({row["labels"] for row in result["rows"]})
    lines = ["| model | " + " | ".join(f"{count:,}" for count in counts) + " |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for title, by_count in errors.items():
        cells = " | ".join(cell(by_count.get(count, [])) for count in counts)
        lines.append(f"| {title} | {cells} |")
    reading = []
    for count in counts:
        means = {title: statistics.mean(of[count]) for title, of in errors.items() if count in of}
        reading.append(f"- {count:,} labels, fewest errors: {min(means, key=means.__getitem__)}")
    return TEMPLATE.read_text().format(
        table="\n".join(lines),
        reading="\n".join(reading),
        data=result["data_note"],
        machine=in_words(result["machine"]),
    )


def main(argv: list[str]) -> None:
    """Measures what is missing, and writes the result and the page."""
    native.use_in_inference()
    work = Path(FLAGS.work)
    work.mkdir(parents=True, exist_ok=True)
    store = TokenStore(FLAGS.store)
    encoders, finetuned = map(Path, FLAGS.encoder), map(Path, FLAGS.finetuned)
    rows = measure(store, [*encoders], [*finetuned], work) + kept_rows(Path("results"))
    result = {"rows": rows, "data_note": store.note, "machine": facts()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))
    PICTURE.write_text(picture(result))
    print(f"wrote {RESULT} and {PAGE}")


if __name__ == "__main__":
    flags.DEFINE_string("store", None, "Token store with labels.", required=True)
    flags.DEFINE_multi_string(
        "encoder", None, "Encoder bundle; one of each objective.", required=True
    )
    flags.DEFINE_multi_string(
        "finetuned", [], "Folder with a run of --stage=finetune in finetune/ and its test in test/."
    )
    flags.DEFINE_string("work", "runs/label_efficiency", "Folder that keeps what is done.")
    app.run(main)
