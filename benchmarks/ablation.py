"""Does the learned state help, apart from the weights? Runs it and writes a page.

    python -m benchmarks.ablation --flagfile=trainer/configs/ablation.cfg      (make ablation)

and at the scale of the results, with the flags that its flagfile names,

    python -m benchmarks.ablation --flagfile=trainer/configs/imdb_cpu_ablation.cfg ...

Each classifier starts from one of four states, with the encoder's weights or random ones, after
each objective of pretraining, over several seeds; a seed chooses the weights, the order of the data
and the labelled documents, so that states are compared within a seed. What is done is not done
again: an interrupted run resumes.
"""

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
from absl import app, flags

from benchmarks import state_positions
from benchmarks.machine import facts, in_words
from data_pipelines import flag_fields
from data_pipelines.store.token_store import TokenStore
from trainer import config as configuration
from trainer.config import Config
from trainer.distribution import cluster
from trainer.distribution.distributor import Distributor
from trainer.distribution.make import make_distributor
from trainer.distribution.preemption import StopRequest
from trainer.report_page.statistics import mean_of_runs
from trainer.stages.evaluate import evaluate
from trainer.stages.finetune import finetune
from trainer.stages.pretrain import pretrain
from trainer.stages.run_stage import open_store
from trainer.training import precision
from trainer.training.run import Run

FLAGS = flags.FLAGS
OBJECTIVES = {"sequence_autoencoder": "sequence autoencoder", "language_model": "language model"}
WEIGHTS = ("encoder", "random")
STATES = configuration.INITIAL_STATES
TEMPLATE = Path(__file__).with_name("ablation.template.md")


def cells(objectives: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (objective, weights, state) of each classifier of a seed.

    From random weights and zeros nothing comes from an encoder: that one is made once, under "".
    """
    yield "", "random", "zero"
    for objective in objectives:
        for weights in WEIGHTS:
            for state in STATES:
                if (weights, state) != ("random", "zero"):
                    yield objective, weights, state


def test_error(
    base: Config,
    store: TokenStore,
    distributor: Distributor,
    seed: int,
    cell: tuple[str, str, str],
) -> float:
    """Returns the test error, percent, of one classifier; trains what is not there yet."""
    objective, weights, state = cell
    root = Path(base.run_dir)
    encoder = root / f"pretrain-{objective}-{seed}"
    folder = root / f"finetune-{'-'.join(filter(None, cell))}-{seed}"
    done = folder / "test.json"
    if done.exists():
        return json.loads(done.read_text())["error_percent"]
    config = replace(
        base,
        seed=seed,
        pretrain_objective=objective or "sequence_autoencoder",
        encoder=str(encoder / "encoder") if objective else "",
        init_weights=weights,
        initial_state=state,
    )
    keras.backend.clear_session()
    stop = StopRequest(("TERM",), config.grace_seconds)
    run = Run(config, distributor, store, stop, say)
    if objective and not (encoder / "encoder" / "encoder.json").exists():
        pretrain(run, encoder)
    finetune(run, folder)
    error = evaluate(run, folder / "classifier", "test", folder)["error_percent"]
    done.write_text(json.dumps({"error_percent": error}) + "\n")
    say(f"{folder.name}: test error {error:.2f} %")
    return error


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def differences(errors: dict[str, list[float]], objective: str, weights: str) -> dict[str, Any]:
    """Returns, by state, the difference to zeros in the same seeds."""
    zero = errors[name_of(objective, weights, "zero")]
    return {
        state: difference(errors[name_of(objective, weights, state)], zero) for state in STATES[1:]
    }


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the mean difference of pairs, in points, and half its 95 % interval."""
    found = mean_of_runs([a - b for a, b in zip(ours, theirs, strict=True)])
    return {"points": found.value, "plus_minus": found.high - found.value}


def says(found: dict[str, float]) -> str:
    """Returns what a difference of errors comes to."""
    if abs(found["points"]) <= found["plus_minus"]:
        return "no difference that these seeds can show"
    return "fewer errors" if found["points"] < 0 else "more errors"


def interval(found: dict[str, float]) -> str:
    """Returns "points (low to high)"."""
    low, high = (found["points"] + sign * found["plus_minus"] for sign in (-1, 1))
    return f"{found['points']:+.2f} ({low:+.2f} to {high:+.2f})"


def titles_of(result: dict[str, Any]) -> dict[str, str]:
    """Returns the names of the objectives that a result is of, in words."""
    return {objective: OBJECTIVES[objective] for objective in result["weights"]}


def reading(result: dict[str, Any]) -> str:
    """Returns what the figures say of weights and of states, in words."""
    titles = titles_of(result)
    lines = [
        f"- The weights of the {title}, from zeros: {interval(result['weights'][objective])} "
        f"points against random weights from zeros, {says(result['weights'][objective])}."
        for objective, title in titles.items()
    ]
    for weights, title in (("encoder", "on top of the encoder's weights"), ("random", "alone")):
        found = [
            of_state
            for objective in titles
            for of_state in result["differences"][f"{objective}/{weights}"].values()
        ]
        fewer = sum(says(of_state) == "fewer errors" for of_state in found)
        more = sum(says(of_state) == "more errors" for of_state in found)
        largest = max((of_state["points"] for of_state in found), key=abs)
        lines.append(
            f"- The state {title}: of {len(found)} comparisons with zeros {fewer} show fewer "
            f"errors, {more} more, the others none that these seeds can show; the largest mean "
            f"difference is {largest:+.2f} points."
        )
    return "\n".join(lines)


def name_of(objective: str, weights: str, state: str) -> str:
    """Returns the name of a cell in the results."""
    if (weights, state) == ("random", "zero"):
        objective = ""
    return "/".join(filter(None, (objective, weights, state)))


def render(result: dict[str, Any]) -> str:
    """Returns the page."""
    errors = result["test_error_percent"]
    lines = [f"| objective | weights | {' | '.join(STATES)} |", "|---" * (2 + len(STATES)) + "|"]
    titles = titles_of(result)
    for objective, title in titles.items():
        for weights in WEIGHTS:
            row = [errors[name_of(objective, weights, state)] for state in STATES]
            lines.append(f"| {title} | {weights} | {' | '.join(map(mean_and_spread, row))} |")
    readings = []
    for objective, title in titles.items():
        for weights in WEIGHTS:
            for state, found in result["differences"][f"{objective}/{weights}"].items():
                readings.append(
                    f"| {title} | {weights} | {state} | {interval(found)} | {says(found)} |"
                )
    page = TEMPLATE.read_text().format(
        table="\n".join(lines),
        differences="\n".join(readings),
        reading=reading(result),
        seeds=len(result["seeds"]),
        labels=f"{result['labelled_documents']:,}",
        source=result["source"],
        flagfile=result["flagfile"],
        documents=f"{result['test_documents']:,}",
        machine=in_words(result["machine"]),
    )
    return page + state_positions.section() if result["source"].startswith("tfds:imdb") else page


def mean_and_spread(errors: Sequence[float]) -> str:
    """Returns "mean ± standard deviation" over the seeds."""
    return f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f}"


def main(argv: list[str]) -> None:
    """Trains what is missing, writes the JSON and the page."""
    named = [a.partition("=")[2] for a in sys.argv if a.startswith("--flagfile=")]
    if not named:
        raise app.UsageError("the page names the flags it is of: give them as --flagfile=FILE")
    base = configuration.from_flags()
    Path(base.run_dir).mkdir(parents=True, exist_ok=True)
    alone = cluster.resolve({})
    distributor = make_distributor("one_device", alone, base.collective_timeout_seconds)
    base = precision.resolved(base, distributor, Path(base.run_dir), say)
    store = open_store(base, alone, print)
    seeds = list(range(FLAGS.seeds))
    errors: dict[str, list[float]] = {}
    for seed in seeds:
        for cell in cells(FLAGS.objectives):
            error = test_error(base, store, distributor, seed, cell)
            errors.setdefault(name_of(*cell), []).append(error)
    result = {
        "seeds": seeds,
        "source": base.source,
        "flagfile": named[0],
        "labelled_documents": base.finetune_documents or len(store.split("train")),
        "test_documents": len(store.split("test")),
        "test_error_percent": errors,
        "differences": {
            f"{objective}/{weights}": differences(errors, objective, weights)
            for objective in FLAGS.objectives
            for weights in WEIGHTS
        },
        "weights": {
            objective: difference(errors[f"{objective}/encoder/zero"], errors["random/zero"])
            for objective in FLAGS.objectives
        },
        "machine": facts(),
    }
    Path(FLAGS.out).write_text(json.dumps(result, indent=1) + "\n")
    Path(FLAGS.page).write_text(render(result))
    print(f"wrote {FLAGS.out} and {FLAGS.page}")


if __name__ == "__main__":
    flag_fields.define([Config])
    flags.DEFINE_multi_enum("objectives", [*OBJECTIVES], [*OBJECTIVES], "Which ones.")
    flags.DEFINE_integer("seeds", 3, "How many seeds.", lower_bound=2, upper_bound=10)
    flags.DEFINE_string("out", "benchmarks/results/learned_states.json", "JSON that is written.")
    flags.DEFINE_string("page", "docs/learned-states.md", "Page that is written.")
    app.run(main)
