"""Where an initial state works: the loss of each of a text's first words, from three states.

  python -m benchmarks.state_positions --run_dir=RUN --store=DIR --out=NAME

RUN is the folder of a pretraining with language_model or bag_autoencoder, whose newest checkpoint
has the softmax that an encoder bundle leaves out. Validation documents are read from zeros, from
the mean state and from the learned state. The result is the nats of each word from the first to
the POSITIONS-th, paired by document, in benchmarks/results/NAME.json; docs/learned-states-imdb.md
shows the results that are there, and docs/images/state-positions.svg draws them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks import line_chart
from benchmarks.machine import facts, in_words
from data_pipelines.errors import InputError
from data_pipelines.store.split_view import SplitView
from data_pipelines.store.token_store import TokenStore
from trainer.distribution.variables import assign
from trainer.models import bundle
from trainer.models.encoder import LearnedState, token_mask
from trainer.models.language_model import LanguageModel
from trainer.models.text_model import EXACT, all_but_last
from trainer.safe_files import replace_text
from trainer.stages.pretrain import OBJECTIVES
from trainer.training import checkpoint

POSITIONS = 50
STATES = ("zero", "mean", "learned")
SHOWN = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 50))  # first and last word of a column
TITLES = {"language_model": "language model", "bag_autoencoder": "bag autoencoder"}
RESULTS = Path("benchmarks/results")
TEMPLATE = Path(__file__).with_name("state_positions.template.md")
PICTURE = Path("docs/images/state-positions.svg")


def trained_model(run_dir: Path) -> tuple[str, LanguageModel, dict[str, list[LearnedState]]]:
    """Returns a pretraining's objective, its newest checkpoint's model, and its states by name.

    Raises:
        InputError: The run has no checkpoint, or its objective predicts no next words.
    """
    loaded = bundle.load(run_dir / "encoder", "encoder", "--run_dir")
    objective = loaded.info["objective"]
    if objective not in TITLES:
        raise InputError(
            f"--run_dir={run_dir} is of {objective}: name a run of {' or '.join(TITLES)}"
        )
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    if not folders:
        raise InputError(f"--run_dir={run_dir} has no checkpoint")
    _, tensors = checkpoint.read(folders[-1])
    model = OBJECTIVES[objective](
        bundle.encoder_of(loaded), tied=loaded.info["config"]["tied_softmax"]
    )
    model.build()
    assign(bundle.encoder_variables(model.encoder) | bundle.decoder_variables(model), tensors)
    found = {name: loaded.state(name) for name in ("mean", "learned")}
    zeros = [LearnedState(np.zeros_like(h), np.zeros_like(c)) for h, c in found["mean"]]
    return objective, model, {"zero": zeros, **found}


def losses_of(model: LanguageModel) -> Callable[..., tf.Tensor]:
    """Returns a function that gives the nats of each word: float32 [batch, time], 0 at padding."""

    @tf.function(reduce_retracing=True)
    def run(tokens: tf.Tensor, lengths: tf.Tensor, state: list[list[tf.Tensor]]) -> tf.Tensor:
        shape = tf.shape(tokens)
        start = [[tf.tile(part[None], [shape[0], 1]) for part in layer] for layer in state]
        rows = {"tokens": tokens, "lengths": lengths}
        outputs, _ = model.read(start, rows, training=False, noise=EXACT)
        predicting = tf.concat([start[-1][0][:, None], all_but_last(outputs)], axis=1)
        counted = token_mask(tokens, lengths)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.boolean_mask(tokens, counted), model.logits(tf.boolean_mask(predicting, counted))
        )
        return tf.scatter_nd(tf.where(counted), losses, tf.cast(shape, tf.int64))

    return run


def measure(
    model: LanguageModel, states: dict[str, list[LearnedState]], view: SplitView
) -> dict[str, np.ndarray]:
    """Returns, by state, the nats of each document's first words: [documents, POSITIONS].

    A word that a document does not have is NaN.
    """
    run = losses_of(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in states}
    for documents in np.array_split(np.arange(len(view)), max(1, len(view) // 32)):
        lengths = np.minimum(view.lengths_of(documents), POSITIONS)
        words = view.gather_parts(documents, np.zeros_like(lengths), lengths)
        mask = np.arange(POSITIONS) < lengths[:, None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = words
        for name, state in states.items():
            nats = run(tokens, lengths.astype(np.int32), [list(layer) for layer in state]).numpy()
            found[name].append(np.where(mask, nats, np.nan))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def summary(nats: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the mean nats by state and position, and what a state saves against zeros."""
    saved: dict[str, list[dict[str, float]]] = {}
    for name in STATES[1:]:
        gain = nats["zero"] - nats[name]
        saved[name] = []
        for first, last in SHOWN:
            each = gain[:, first - 1 : last]
            each = np.nanmean(each[~np.isnan(each[:, 0])], axis=1)
            half = 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5
            saved[name].append({"nats": round(float(each.mean()), 4), "half_width": round(half, 4)})
    by_position = {
        name: [round(float(x), 4) for x in np.nanmean(nats[name], axis=0)] for name in STATES
    }
    return {"nats": by_position, "saved": saved, "documents": len(nats["zero"])}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns Markdown: what each state saves, in nats a word, by the words' place in the text."""
    head = [f"word {first}" if first == last else f"{first} to {last}" for first, last in SHOWN]
    lines = [f"| objective | start | {' | '.join(head)} |", "|---" * (2 + len(SHOWN)) + "|"]
    for result in results:
        means = result["nats"]["zero"]
        cells = [f"{np.mean(means[first - 1 : last]):.2f}" for first, last in SHOWN]
        lines.append(f"| {result['objective']} | zeros: nats | {' | '.join(cells)} |")
        for name in STATES[1:]:
            cells = [f"−{x['nats']:.3f} ± {x['half_width']:.3f}" for x in result["saved"][name]]
            cells = [cell.replace("−-", "+") for cell in cells]
            lines.append(f"| {result['objective']} | {name}: change | {' | '.join(cells)} |")
    return "\n".join(lines)


def section() -> str:
    """Returns what docs/learned-states-imdb.md says of the results that are there."""
    return TEMPLATE.read_text().format(table=table(kept()))


def kept() -> list[dict[str, Any]]:
    """Returns the results in RESULTS."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("state_positions_*.json"))]


def picture(results: Sequence[dict[str, Any]]) -> str:
    """Returns an SVG: the nats that the learned state saves at each word, a line each result."""
    lines = {}
    for result in results:
        gains = np.subtract(result["nats"]["zero"], result["nats"]["learned"])
        lines[result["objective"]] = [(n, float(gain)) for n, gain in enumerate(gains, 1)]
    labels = ("word", "nats saved by the learned state")
    return line_chart.svg(lines, (1, 10, 20, 30, 40, 50), (0.01, 0.03, 0.1, 0.3, 1, 2), labels)


def main() -> None:
    """Writes the result as JSON, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state_positions")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of a pretraining")
    parser.add_argument("--store", required=True, help="token store that it was trained on")
    parser.add_argument("--out", required=True, help="name of the JSON in benchmarks/results")
    options = parser.parse_args()
    objective, model, states = trained_model(options.run_dir)
    store = TokenStore(options.store)
    nats = measure(model, states, store.split("validation"))
    result = {
        "objective": TITLES[objective],
        "units": model.encoder.units,
        "data_note": store.note,
        **summary(nats),
        "machine": facts(),
    }
    replace_text(RESULTS / f"{options.out}.json", json.dumps(result, indent=1) + "\n")
    replace_text(PICTURE, picture(kept()))
    print(table([result]), in_words(result["machine"]), sep="\n")


if __name__ == "__main__":
    main()
