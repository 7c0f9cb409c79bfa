r"""Which fine-tuning is better: candidates, cross-validated on the documents with labels.

    python -m benchmarks.candidates --flagfile=trainer/configs/imdb_cpu_20min.cfg --data_dir=DIR \
        --encoder=results/imdb_cpu_20min-seed1/encoder --work=FOLDER \
        --candidate='as it is' --candidate='virtual: --virtual_adversarial_weight=1'

Each document of the train and validation splits is classified once, by a classifier that was
trained for all its steps on the other folds, so that no step is chosen. On IMDB 25,000 paired
answers tell half a point, which the 3,799 of the validation split do not. The test split is not
read. An encoder that was pretrained on these texts has read them without their labels, so the
errors are a little too low, for all candidates. An interrupted run continues from what FOLDER
holds.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import warmstate
from benchmarks.cross_validation import examples, folds, summary, write_splits, wrong_documents
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.sources import open_source
from trainer.models import bundle


class Candidate(NamedTuple):
    """Flags of fine-tuning under a name."""

    name: str
    flags: list[str]

    def folder(self, flagfile: str) -> str:
        """Returns the name of the folder of its runs, another one for other flags."""
        flags = json.dumps([Path(flagfile).read_text(), self.flags])
        return f"{self.name}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def candidate(text: str) -> Candidate:
    """Returns the candidate that `NAME` or `NAME: FLAGS` gives."""
    name, _, flags = text.partition(": ")
    return Candidate(name, shlex.split(flags))


def read(spec: str, data_dir: str | None) -> tuple[list[tuple[str, int]], list[str]]:
    """Returns texts and labels, and texts without labels, of all splits but test; in order."""
    source = open_source(spec, data_dir)
    labelled: list[tuple[str, int]] = []
    unlabelled: list[str] = []
    for found in examples(source, [split for split in source.splits if split != "test"]):
        if found.label is None:
            unlabelled.append(found.text)
        else:
            labelled.append((found.text, found.label))
    return labelled, unlabelled


def prepared(
    parts: Sequence[Sequence[tuple[str, int]]],
    fold: int,
    unlabelled: Sequence[str],
    encoder: Path,
    folder: Path,
) -> Path:
    """Returns the store of a fold, whose test split is the fold; made where it is missing."""
    store = folder / "store"
    if not (store / "manifest.json").exists():
        source = write_splits(parts, fold, folder)
        if unlabelled:
            rest = folder / "unsupervised.jsonl"
            rest.write_text("".join(json.dumps({"text": text}) + "\n" for text in unlabelled))
            source += f",unsupervised={rest}"
        vocabulary = str(encoder / "vocab.txt")
        warmstate.prepare(store, source=source, vocab_file=vocabulary, log=lambda line: None)
    return store


def wrong_after_fine_tuning(
    store: Path, encoder: Path, flags: Sequence[str], folder: Path
) -> np.ndarray:
    """Returns which test documents a fine-tuning gets wrong: bool [documents]; kept in `folder`."""
    kept = folder / "wrong.npy"
    if not kept.exists():
        common = [sys.executable, "-m", "trainer.main", *flags, f"--store={store}"]
        for stage in (
            [f"--run_dir={folder}", "--stage=finetune", f"--encoder={encoder}", "--finetune_refit"],
            [f"--run_dir={folder}/test", "--stage=evaluate", f"--classifier={folder}/classifier"],
        ):
            done = subprocess.run(
                [*common, *stage], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if done.returncode:
                raise SystemExit(
                    f"{shlex.join(done.args)} ended with {done.returncode}:\n{done.stdout}"
                )
        np.save(kept, wrong_documents(folder / "test"))
    return np.load(kept)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the summary as Markdown."""
    lines = ["| fine-tuning | error | more than the first | 95 % |", "|---|---|---|---|"]
    for row in rows:
        value, low, high = row["more_than_the_first_percent"]
        line = f"| {row['model']} | {row['mean_percent'][0]:.2f} % |"
        is_first = row is rows[0]
        lines.append(
            line + (" | |" if is_first else f" {value:+.2f} | {low:+.2f} to {high:+.2f} |")
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, writes the figures as JSON, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates")
    parser.add_argument("--flagfile", required=True, help="flags that all candidates share")
    parser.add_argument("--source", default="tfds:imdb_reviews", help="documents with labels")
    parser.add_argument("--data_dir", help="folder of prepared TFDS data sets, for tfds: sources")
    parser.add_argument("--encoder", type=Path, required=True, help="where fine-tuning starts")
    parser.add_argument("--candidate", type=candidate, action="append", required=True)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--work", type=Path, required=True, help="keeps what is done")
    parser.add_argument("--out", default="candidates", help="name of the JSON")
    options = parser.parse_args()
    if options.folds < 3:
        parser.error(f"--folds={options.folds}: a fold is tested, and another is for validation")
    labelled, unlabelled = read(options.source, options.data_dir)
    parts = folds(labelled, options.folds)
    digest = bundle.read_info(options.encoder, "encoder", "--encoder")["tensors_sha256"]
    found = []
    for fold in range(options.folds):
        folder = options.work / digest[:16] / f"fold-{fold}"
        store = prepared(parts, fold, unlabelled, options.encoder, folder)
        found.append({})
        for each in options.candidate:
            flags = [f"--flagfile={options.flagfile}", *each.flags]
            work = folder / each.folder(options.flagfile)
            found[-1][each.name] = wrong_after_fine_tuning(store, options.encoder, flags, work)
            print(
                f"fold {fold}, {each.name}: {100 * found[-1][each.name].mean():.2f} %", flush=True
            )
    rows = summary(found)
    print(table(rows))
    what = {
        "source": options.source,
        "flagfile": options.flagfile,
        "candidates": {each.name: shlex.join(each.flags) for each in options.candidate},
        "encoder_sha256": digest,
        "documents": len(labelled),
    }
    write_results(options.out, facts(), what | {"rows": rows})


if __name__ == "__main__":
    main()
