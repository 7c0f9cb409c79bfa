"""Keeps a run in results/*.json and its classifier beside it, and renders README's table from them.

  python -m benchmarks.kept_runs record RUN_DIR --out=results/NAME.json
  python -m benchmarks.kept_runs record FOLDER --encoder_of=results/OTHER.json --out=results/...
  python -m benchmarks.kept_runs again results/NAME.json FOLDER...  # other fine-tunings, refits
  python -m benchmarks.kept_runs halve RUN_DIR/warm/classifier --out=results/NAME   # or an encoder
  python -m benchmarks.kept_runs table            # README.md and docs/reproduction.md

Only the published rows below are typed by hand.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import InputError
from trainer.safe_files import refuse_to_replace, replace_text

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Test error on IMDB's official split, percent.
PUBLISHED = (
    ("NBSVM-bi (Wang & Manning 2012)", 8.78),
    ("LSTM from scratch (Dai & Le 2015)", 13.50),
    ("LM-LSTM (Dai & Le 2015)", 7.64),
    ("SA-LSTM (Dai & Le 2015)", 7.24),
    ("virtual adversarial LSTM (Miyato et al. 2017)", 5.91),
    ("ULMFiT, one model (Howard & Ruder 2018)", 5.30),
)
# The rows that the README shows; docs/reproduction.md has them all.
HEADLINE = (
    "imdb_cpu_virtual, warm start",
    "imdb_cpu_sequence_autoencoder, warm start",
    "imdb_cpu_20min, warm start",
    "TF-IDF of words and pairs, logistic regression",
    "imdb_cpu_scratch, from scratch",
)
CURVES = ("loss", "perplexity", "error_percent", "learning_rate")
CURVE_POINTS = 200
# What `again` adds to a result.
FINETUNED_AGAIN, REFITTED = "finetuned_again", "refitted"


def record(run_dir: Path, path: Path, evaluation: Path | None = None) -> dict[str, Any]:
    """Writes and returns the result of the finished run of --stage=all in `run_dir`.

    Other fine-tunings from its encoder that `path` has stay there.

    Args:
        evaluation: Folder of a run of --stage=evaluate on the float16 bundle that is kept beside
            the result (see `halve`); its figures are added to the result.

    Raises:
        InputError: The run has not ended, is of another stage, or its files are damaged; or `path`
            has fine-tunings from another encoder.
    """
    report, environment = run_files(run_dir)
    if report["stage"] != "all":
        raise InputError(f"{run_dir} is of --stage={report['stage']}: a result is of --stage=all")
    metrics = {
        str(file.parent.relative_to(run_dir)): file for file in run_dir.rglob("metrics.jsonl")
    }
    result = report | _of_run(path, report, environment, metrics)
    old = json.loads(path.read_text()) if path.exists() else {}
    added = {name: old[name] for name in (FINETUNED_AGAIN, REFITTED) if name in old}
    if added and old["broadcast"]["digests"] != result["broadcast"]["digests"]:
        raise InputError(f"{path} has fine-tunings from another encoder: choose another --out")
    return _written(path, result | added, evaluation)


def record_finetuning(
    folder: Path, pretrained: Path, path: Path, evaluation: Path | None = None, time: str = ""
) -> dict[str, Any]:
    """Writes and returns the result of a fine-tuning, by another recipe, of a result's encoder.

    Args:
        folder: Has a run of --stage=finetune in `finetune`, and its test in `test`.
        pretrained: The result with the encoder, whose pretraining the new result repeats.
        evaluation: As for `record`.
        time: What the table says in place of minutes, for a recipe that needs other runs too.

    Raises:
        InputError: A run has not ended, starts from another encoder, or its files are damaged.
    """
    base = json.loads(pretrained.read_text())
    tuned, environment = run_files(folder / "finetune")
    tested, _ = run_files(folder / "test")
    refuse_another_encoder(base, pretrained, folder, tuned["finetune"])
    metrics = {"warm": folder / "finetune/metrics.jsonl"}
    result = {
        **{name: tuned[name] for name in ("stage", "world_size", "wall_seconds")},
        "pretrain": base["pretrain"],
        "warm": {name: part for name, part in tuned["finetune"].items() if name != "broadcast"},
        "broadcast": tuned["finetune"]["broadcast"],
        "test": {"warm": tested["test"]},
        "test_error_percent": {"warm": tested["test"]["error_percent"]},
        **_of_run(path, tuned, environment, metrics),
        **({"time": time} if time else {}),
    }
    result["curves"] |= {"pretrain": base["curves"]["pretrain"]}
    return _written(path, result, evaluation)


def _of_run(
    path: Path, report: dict[str, Any], environment: dict[str, Any], metrics: dict[str, Path]
) -> dict[str, Any]:
    """Returns what every result has of its run, without names of the machine's folders."""
    config = {k: v for k, v in report["config"].items() if k not in MACHINE_FLAGS}
    sources = {name: without_folders(config[name]) for name in SOURCE_FLAGS if name in config}
    return {
        "kind": "run",
        "name": path.stem,
        "data_note": without_folders(report["data_note"]),
        "config": config | sources,
        "environment": {k: v for k, v in environment.items() if k != "command"},
        "curves": {name: curves(file) for name, file in sorted(metrics.items())},
    }


def _written(path: Path, result: dict[str, Any], evaluation: Path | None) -> dict[str, Any]:
    """Returns `result` with the figures of `evaluation`, after writing it."""
    if evaluation is not None:
        found, _ = run_files(evaluation)
        if "test" not in found:
            raise InputError(f"{evaluation} is no run of --stage=evaluate on the test split")
        result["kept_bundle"] = {"test": found["test"]}
    replace_text(path, json.dumps(result, indent=1) + "\n")
    return result


def without_folders(text: str) -> str:
    """Returns `text` with each source on this machine, as in csv:/data/a.csv, cut to csv:a.csv."""
    return re.sub(r"(?<=[a-z0-9][:=])/(?!/)[^\s,;:]*/", "", text)


def refuse_another_encoder(
    result: dict[str, Any], path: Path, folder: Path, tuned: dict[str, Any]
) -> None:
    """Raises InputError unless a fine-tuning starts from the encoder of the result in `path`.

    It may start from the encoder in float16 that is kept beside the result.
    """
    kept = path.with_suffix("") / "encoder/encoder.json"
    halved = json.loads(kept.read_text())["tensors_sha256"] if kept.exists() else ""
    same = set(tuned["broadcast"]["digests"]) == set(result["broadcast"]["digests"])
    if not same and tuned["encoder_sha256"] != halved:
        raise InputError(f"{folder / 'finetune'} starts from another encoder")


def add_finetunings(path: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Adds other fine-tunings from the encoder of the result in `path` to it, and returns it.

    Args:
        folders: Each has a run of --stage=finetune in `finetune`, and one of --stage=evaluate on
            the test split in `test`. They may start from the encoder in float16 that is kept beside
            the result. The table lists runs with --finetune_refit in a separate row.

    Raises:
        InputError: A run has not ended, starts from another encoder, is in the result already, or
            its files are damaged.
    """
    result = json.loads(path.read_text())
    for folder in folders:
        tuned, tested = tuned_and_tested(folder)
        part, config = tuned["finetune"], tuned["config"]
        refuse_another_encoder(result, path, folder, part)
        figures = {"seed": config["seed"], "test": tested["test"]}
        if not config["finetune_refit"]:
            figures["validation"] = part["validation"]
        rows = result.setdefault(REFITTED if config["finetune_refit"] else FINETUNED_AGAIN, [])
        if figures in rows:
            raise InputError(f"{folder} is in {path} already")
        rows.append(figures)
    replace_text(path, json.dumps(result, indent=1) + "\n")
    return result


def tuned_and_tested(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the reports of a run of --stage=finetune in `finetune` and of its test in `test`."""
    (tuned, _), (tested, _) = (run_files(folder / name) for name in ("finetune", "test"))
    return tuned, tested


def run_files(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the report and the environment of a finished run.

    Raises:
        InputError: The run has not ended, or its files are damaged.
    """
    try:
        report = json.loads((run_dir / "report.json").read_text())
        return report, json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir} holds no finished run: {error}") from None


# Flags that name folders and files of the machine.
MACHINE_FLAGS = (
    *("run_dir", "store", "data_dir", "encoder", "classifier", "backward_encoder"),
    "init_embeddings",
)
# Flags whose values may name files of the machine.
SOURCE_FLAGS = ("source", "unlabelled", "labelled")


def curves(path: Path) -> dict[str, list[list[float]]]:
    """Returns [step, value] pairs of each curve of a metrics.jsonl, at most CURVE_POINTS each."""
    found: dict[str, list[list[float]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name in CURVES:
            if isinstance(row.get(name), int | float) and math.isfinite(row[name]):
                found.setdefault(name, []).append([row["step"], float(f"{row[name]:.5g}")])
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: list[list[float]]) -> list[list[float]]:
    """Returns at most CURVE_POINTS evenly spaced points, including the last one."""
    stride = -(-len(points) // CURVE_POINTS)
    return points[::-1][::stride][::-1] if stride else []


def table(folder: Path, names: Collection[str] = ()) -> str:
    """Returns a Markdown table of the results in `folder`, best first, one row for each recipe.

    A recipe's time is its quickest run's, with that run's cores.

    Args:
        folder: Holds the results as JSON files.
        names: The rows to show; empty shows all.
    """
    rows = [(error, name, f"{error:.2f} %", "published", "") for name, error in PUBLISHED]
    recipes: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result["kind"] == "baseline":
            error, time = result["test_error_percent"], result.get("time", "minutes")
            rows.append((error, result["title"], f"{error:.2f} %", "run here", time))
        else:
            recipes.setdefault(result["name"].partition("-seed")[0], []).append(result)
    for name, results in recipes.items():
        rows += rows_of_recipe(name, results)
    lines = ["| model | test error | | quickest run |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {error} | {how} | {time} |"
        for _, name, error, how, time in sorted(rows)
        if not names or name in names
    ]
    return "\n".join(lines)


def rows_of_recipe(
    name: str, results: Sequence[dict[str, Any]]
) -> list[tuple[float, str, str, str, str]]:
    """Returns a row for each start of a recipe, and one for its refits if there are any.

    Returns:
        For each row its mean error in percent, then the cells of the table.
    """
    starts = list(results[0]["test_error_percent"])
    quickest = min(results, key=seconds_of)
    cores = quickest["environment"]["cores"]
    time = f"{seconds_of(quickest) / 60:.0f} min on {cores} core{'s' * (cores > 1)}"
    time += ", both starts together" if len(starts) > 1 else ""
    time = quickest.get("time", time)
    rows = []
    for start in starts:
        errors = [r["test_error_percent"][start] for r in results]
        how = f"run here, {len(errors)} run{'s' * (len(errors) > 1)}"
        more = [x for r in results for x in r.get(FINETUNED_AGAIN, ()) if start == "warm"]
        if more:
            errors += [each["test"]["error_percent"] for each in more]
            how += f", {len(errors)} fine-tunings"
        title = f"{name}, {'warm start' if start == 'warm' else 'from scratch'}"
        rows.append((statistics.mean(errors), title, spread(errors), how, time))
    refits = [x["test"]["error_percent"] for r in results for x in r.get(REFITTED, ())]
    if refits:
        how = f"run here, {len(refits)} refit{'s' * (len(refits) > 1)}"
        title = f"{name}, refitted on validation too"
        rows.append((statistics.mean(refits), title, spread(refits), how, time))
    return rows


def seconds_of(result: dict[str, Any]) -> float:
    """Returns how long a run took, over all of its starts.

    `wall_seconds` is the time since the last start; the parts' seconds include earlier ones.
    """
    parts = (result.get(part, {}).get("seconds", 0.0) for part in ("pretrain", "warm", "scratch"))
    return max(result["wall_seconds"], sum(parts))


def spread(errors: Sequence[float]) -> str:
    """Returns the mean of `errors`, and their range if there are several."""
    mean = f"{statistics.mean(errors):.2f} %"
    return mean if len(errors) == 1 else f"{mean} ({min(errors):.2f}-{max(errors):.2f})"


def write_table(page: Path, folder: Path, names: Collection[str] = ()) -> None:
    """Writes the table between the two marks of `page`.

    Raises:
        InputError: A mark is missing.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{page} needs the lines {BEGIN} and {END}, where the table goes")
    replace_text(page, f"{before}{BEGIN}\n{table(folder, names)}\n{END}{after}")


def halve(source: Path, target: Path, name: str) -> None:
    """Writes the bundle `source` to `target` in float16, half the bytes, without MACHINE_FLAGS.

    Args:
        name: "encoder", "decoder" or "classifier".

    Raises:
        InputError: `source` is no such bundle, or has a number beyond float16's range; `target`
            exists or cannot be written.
    """
    from trainer.models import bundle  # with TensorFlow, which nothing else here needs

    refuse_to_replace(target, "--out")
    loaded = bundle.load(source, name, "the bundle")
    with np.errstate(over="ignore"):
        tensors = {key: array.astype(np.float16) for key, array in loaded.tensors.items()}
    for key, array in tensors.items():
        if not np.isfinite(array).all():
            raise InputError(f"{source}: {key!r} has numbers that float16 cannot hold")
    info = dict(loaded.info)
    if "config" in info:
        info["config"] = {k: v for k, v in info["config"].items() if k not in MACHINE_FLAGS}
    bundle.save(target, name, tensors, info, source / "vocab.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_run = commands.add_parser("record", help="write the result of a finished run")
    of_run.add_argument("run_dir", type=Path)
    of_run.add_argument("--encoder_of", type=Path, help="the result whose encoder it fine-tunes")
    of_run.add_argument("--time", default="", help="with --encoder_of: the table's time, in words")
    of_run.add_argument("--out", type=Path, required=True)
    of_run.add_argument("--evaluation", type=Path, help="of the bundle that `halve` wrote")
    of_again = commands.add_parser("again", help="add other fine-tunings from a result's encoder")
    of_again.add_argument("result", type=Path)
    of_again.add_argument("folders", type=Path, nargs="+")
    of_half = commands.add_parser("halve", help="keep an encoder or a classifier in float16")
    of_half.add_argument("bundle", type=Path)
    of_half.add_argument("--out", type=Path, required=True)
    of_table = commands.add_parser("table", help="write the tables into the README and the docs")
    of_table.add_argument("--results", type=Path, default=Path("results"))
    of_table.add_argument("--readme", type=Path, default=Path("README.md"))
    of_table.add_argument("--page", type=Path, default=Path("docs/reproduction.md"))
    options = parser.parse_args(argv)
    try:
        if options.command == "record":
            out, evaluation = options.out, options.evaluation
            if options.encoder_of is None:
                if options.time:
                    raise InputError(f"--time={options.time} is for --encoder_of; leave it out")
                record(options.run_dir, out, evaluation)
            else:
                record_finetuning(
                    options.run_dir, options.encoder_of, out, evaluation, options.time
                )
        elif options.command == "again":
            add_finetunings(options.result, options.folders)
        elif options.command == "halve":
            is_encoder = (options.bundle / "encoder.json").is_file()
            halve(options.bundle, options.out, "encoder" if is_encoder else "classifier")
        else:
            write_table(options.readme, options.results, HEADLINE)
            write_table(options.page, options.results)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
