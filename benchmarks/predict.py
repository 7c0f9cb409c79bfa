"""Times predictions from raw text, ours and Keras's: reviews a second, and the first answer.

    python -m benchmarks.predict

The model has random weights: they do not change the time. Keras is what one writes first:
TextVectorization, Embedding, LSTM, Dense, `predict`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import facts
from benchmarks.processes import Program, in_turn, min_and_median, write_results
from benchmarks.train_step import make_store
from data_pipelines.sources.movie_reviews import MovieReviews
from data_pipelines.store.token_store import TokenStore

REVIEWS, DIM, UNITS, MAX_TOKENS = 512, 256, 512, 400

WRITE_BUNDLE = """
import sys
from pathlib import Path
from data_pipelines.quiet_tensorflow import import_quietly
import_quietly()
from data_pipelines.store.token_store import TokenStore
from trainer.models import bundle
from trainer.distribution.variables import values_of
from trainer.models.classifier import Classifier
from trainer.models.encoder import Encoder
store, folder = TokenStore(Path(sys.argv[1])), Path(sys.argv[2])
dim, units, most = map(int, sys.argv[3:])
classifier = Classifier(Encoder(store.vocab_size, dim, units, seed=0), 2)
classifier.build()
model = bundle.classifier_model(classifier)
info = {"model": model, "max_tokens": most, "tokenizer": store.tokenizer_config}
info |= {"vocab_sha256": store.vocab_sha256}
tensors = values_of(bundle.classifier_variables(classifier))
bundle.save(folder, "classifier", tensors, info, store.vocab_path)
"""

FIRST_ANSWER = """
import sys
from trainer.inference.text_classifier import load_classifier
print(load_classifier(sys.argv[1]).probabilities(["A film that stays with you ."]))
"""
IMPORT = "import tensorflow"


def write_bundle(store: Path, folder: Path, dim: int = DIM, units: int = UNITS) -> None:
    """Writes a classifier bundle with the store's vocabulary."""
    arguments = [str(store), str(folder), str(dim), str(units), str(MAX_TOKENS)]
    subprocess.run(
        [sys.executable, "-c", WRITE_BUNDLE, *arguments], check=True, stderr=subprocess.DEVNULL
    )


def write_reviews(path: Path) -> None:
    """Writes REVIEWS real reviews, one a line."""
    source = MovieReviews()
    texts: list[str] = []
    for part in source.parts("test"):
        for example in source.examples("test", part):
            texts.append(" ".join(example.text.split()))
            if len(texts) == REVIEWS:
                path.write_text("\n".join(texts), encoding="utf-8")
                return
    raise RuntimeError(f"there are only {len(texts)} reviews")


def seconds_of(program: str, *arguments: str) -> float:
    """Returns how long a Python process takes, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    rates, first = results["reviews_per_second"], results["first_answer_seconds"]
    return "\n".join(
        [
            "| prediction from raw text | warmstate | Keras |",
            "|---|---|---|",
            f"| reviews a second, median | {rates['warmstate']['median']:,.0f} "
            f"| {rates['keras']['median']:,.0f} |",
            f"| ours is faster by | {results['ours_is_faster_by']:.2f} x | |",
            f"| first answer, seconds from the process's start, min (median) "
            f"| {first['min']} ({first['median']}) | |",
            f"| of which `import tensorflow` | {results['import_seconds']['min']} "
            f"({results['import_seconds']['median']}) | |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="predict", help="name of the JSON")
    parser.add_argument("--store", help="token store of the reviews; made if missing")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Path(args.store or folder / "store")
        make_store(store)
        bundle, reviews = folder / "classifier", folder / "reviews.txt"
        write_bundle(store, bundle)
        write_reviews(reviews)
        sizes = (TokenStore(store).vocab_size, DIM, UNITS, MAX_TOKENS)
        found = {
            "warmstate": Program("benchmarks.tf_programs", "predict"),
            "keras": Program("benchmarks.tf_programs", "keras_predict"),
        }
        for program in found.values():
            program.ask("load", str(bundle), str(reviews), *sizes)
            program.ask("seconds")
        times = in_turn({n: lambda p=p: p.ask("seconds") for n, p in found.items()}, args.repeats)
        for program in found.values():
            program.close()
        starts = in_turn(
            {
                "first": lambda: seconds_of(FIRST_ANSWER, str(bundle)),
                "import": lambda: seconds_of(IMPORT),
            },
            args.repeats,
        )
    pairs = zip(times["keras"], times["warmstate"], strict=True)
    results = {
        "reviews_per_second": {
            name: min_and_median([REVIEWS / t for t in values]) for name, values in times.items()
        },
        "ours_is_faster_by": round(statistics.median(theirs / ours for theirs, ours in pairs), 2),
        "first_answer_seconds": min_and_median(starts["first"]),
        "import_seconds": min_and_median(starts["import"]),
    }
    print(table(results))
    write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
