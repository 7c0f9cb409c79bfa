"""--context_key on text: the newsgroup of a post, with the mail domain of its author as context.

    python -m benchmarks.context_text --newsgroups=20news-bydate.tar.gz

Posts of 20 Newsgroups are read without their headers. The same classifier is trained from random
weights three times: without the domain, with it as --context_key, and with it as the first words of
the text, in as many tokens more.
"""

import argparse
import csv
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import warmstate
from benchmarks.machine import facts
from benchmarks.processes import write_results
from data_pipelines.sources import Example, open_source
from data_pipelines.sources.text import text_fault

SETTINGS: dict[str, Any] = {
    "embedding_dim": 64,
    "units": 64,
    "pooling": "concat",
    "hidden_units": 0,
    "finetune_steps": 500,
    "finetune_evaluate_every_steps": 250,
    "finetune_batch_size": 32,
    "finetune_learning_rate": 5e-3,
    "finetune_max_tokens": 100,
}
HOW = ("without", "context_key", "first_words")


def domain_and_text(post: str) -> tuple[str, str]:
    """Returns the last two parts of the author's mail domain, "" if there is none, and the text."""
    headers, _, text = post.replace("\t", "\n").partition("\n\n")  # some copies have tabs
    domain = r"^From:.*@(?:[\w-]+\.)*?([\w-]+\.[\w-]+)(?![\w.-])"
    found = re.search(domain, headers, re.MULTILINE)
    return (found[1].lower() if found else ""), text.replace("\0", " ")


def write_posts(newsgroups: str, folder: Path) -> dict[str, int]:
    """Writes SPLIT.csv of the columns domain, text, marked, label; returns documents by split."""
    source = open_source(f"newsgroups20:{newsgroups}")
    counts = {}
    for split in source.splits:
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["domain", "text", "marked", "label"])
            counts[split] = 0
            for part in source.parts(split):
                for post in source.examples(split, part):
                    if not isinstance(post, Example):
                        continue
                    domain, text = domain_and_text(post.text)
                    if text_fault(text):
                        continue
                    words = text.split()[-SETTINGS["finetune_max_tokens"] :]
                    marked = " ".join([domain, *words])
                    table.writerow([domain, text, marked, source.class_names[post.label]])
                    counts[split] += 1
    return counts


def errors(folder: Path, how: str, seeds: int) -> dict[str, Any]:
    """Returns the test error, in percent, for each seed."""
    splits = ",".join(f"{split}={folder}/{split}.csv" for split in ("train", "validation", "test"))
    key = "marked" if how == "first_words" else "text"
    store = warmstate.prepare(
        folder / how,
        source=f"csv:{splits}",
        text_key=key,
        context_key="domain" if how == "context_key" else "",
        log=lambda line: None,
    )
    settings = SETTINGS | ({"context_key": "domain"} if how == "context_key" else {})
    if how == "first_words":  # a domain is at most five tokens
        settings["finetune_max_tokens"] += 5
    found = []
    for seed in range(seeds):
        run = folder / f"{how}-{seed}"
        trained = warmstate.finetune(run, store, log=lambda line: None, seed=seed, **settings)
        tested = warmstate.evaluate(run / "test", store, trained.folder, log=lambda line: None)
        found.append(round(tested["error_percent"], 2))
        print(how, seed, found[-1], flush=True)
    return {"test_error_percent": found, "domains": len(store.context_names)}


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    names = {
        "without": "without the domain",
        "context_key": "`--context_key=domain`",
        "first_words": "the domain as the text's first words",
    }
    lines = ["| classifier | test error, %: mean (each seed) |", "|---|---|"]
    for how, name in names.items():
        found = results[how]["test_error_percent"]
        lines.append(f"| {name} | {np.mean(found):.1f} ({', '.join(f'{e:.1f}' for e in found)}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--newsgroups", required=True, help="20news-bydate.tar.gz")
    parser.add_argument("--out", default="context_text", help="name of the JSON")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {"documents": write_posts(args.newsgroups, folder)}
        for how in HOW:
            results[how] = errors(folder, how, args.seeds)
    print(table(results))
    write_results(args.out, facts(), results)


if __name__ == "__main__":
    main()
