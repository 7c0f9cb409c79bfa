"""Initial states from context, on simulated driven oscillators of random parameters.

    python -m benchmarks.context_states

An LSTM reads the force on a damped oscillator step by step and predicts its position. Frequency,
damping and the position and velocity at the start are random: the context. It is known as a vector,
as the number of a system that was seen in training under other forces, or from ten observed steps
before the first predicted one. The same LSTM is trained from zeros, from a learned constant, from
`ContextState`, and with the context appended to every input. All have the same data, steps and
learning rates.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import facts
from benchmarks.processes import write_results

STEPS, OBSERVED, SYSTEMS = 50, 10, 64
SECONDS_PER_STEP, SUBSTEPS = 0.25, 10
TRAINING, TEST = 3_200, 1_280
UNITS, EPOCHS, BATCH, LEARNING_RATE = 64, 12, 64, 3e-3
NOISE = 0.05
STARTS = ("zeros", "constant", "context_state", "context_state_noise", "appended", "both")
CONTEXTS = ("vector", "id", "observations")


class Data(NamedTuple):
    """Sequences.

    Attributes:
        forces: float32 [sequences, steps, 1].
        context: A vector [sequences, 4], ids [sequences, 1], or forces and positions of the steps
            before, [sequences, observed, 2].
        positions: float32 [sequences, steps, 1], after each step.
    """

    forces: np.ndarray
    context: np.ndarray
    positions: np.ndarray


def simulate(systems: np.ndarray, steps: int, random: np.random.Generator) -> np.ndarray:
    """Returns forces and positions of oscillators: float32 [sequences, steps, 2].

    Args:
        systems: [sequences, 4]: angular frequency, damping ratio, position, velocity at the start.
        steps: How many.
        random: For the forces, which are correlated over some ten steps.
    """
    frequency, damping, position, velocity = systems.T.copy()
    force, found = random.normal(size=len(systems)), []
    for _ in range(steps):
        force = 0.9 * force + np.sqrt(1 - 0.9**2) * random.normal(size=len(systems))
        for _ in range(SUBSTEPS):  # semi-implicit Euler
            pull = force - frequency**2 * position - 2 * damping * frequency * velocity
            velocity = velocity + pull * SECONDS_PER_STEP / SUBSTEPS
            position = position + velocity * SECONDS_PER_STEP / SUBSTEPS
        found.append(np.stack([force, position], axis=1))
    return np.stack(found, axis=1).astype(np.float32)


def random_systems(count: int, random: np.random.Generator) -> np.ndarray:
    """Returns systems for `simulate`."""
    frequency, damping = random.uniform(0.5, 2, count), random.uniform(0.02, 0.3, count)
    return np.stack([frequency, damping, *random.normal(size=(2, count))], axis=1)


def make_data(context: str, seed: int) -> tuple[Data, Data]:
    """Returns training and test data."""
    random = np.random.default_rng(seed)
    count = TRAINING + TEST
    observed = OBSERVED if context == "observations" else 0
    numbers = random.integers(SYSTEMS if context == "id" else count, size=count)
    systems = random_systems(count, random)
    if context == "id":
        systems = systems[numbers]
    found = simulate(systems, observed + STEPS, random)
    known = {"vector": systems.astype(np.float32), "id": numbers[:, None].astype(np.int32)}
    contexts = known.get(context, found[:, :observed])
    both = []
    for rows in (slice(TRAINING), slice(TRAINING, None)):
        later = found[rows, observed:]
        both.append(Data(later[:, :, :1], contexts[rows], later[:, :, 1:]))
    return both[0], both[1]


def make_model(context: str, start: str, data: Data, seed: int) -> Any:
    """Returns a compiled Keras model from forces and context to positions."""
    import keras

    from trainer.models.lstm import WarmLSTM
    from trainer.states import ContextState

    keras.utils.set_random_seed(seed)
    forces = keras.Input(data.forces.shape[1:])
    given = keras.Input(data.context.shape[1:], dtype=str(data.context.dtype))
    inputs, state = forces, None
    if start in ("appended", "both"):
        vector = keras.layers.Embedding(SYSTEMS, 16)(given) if context == "id" else given
        repeated = keras.layers.RepeatVector(STEPS)(keras.layers.Flatten()(vector))
        inputs = keras.layers.Concatenate()([forces, repeated])
    if start.startswith("context_state") or start == "both":
        kinds: dict[str, Any] = {
            "vector": {"hidden_units": UNITS},
            "id": {"ids": SYSTEMS},
            "observations": {"burn_in": OBSERVED},
        }
        noise = NOISE if start.endswith("noise") else 0.0
        state = ContextState(UNITS, noise=noise, seed=seed, **kinds[context])(given)
    kind = "learned" if start == "constant" else None
    lstm = WarmLSTM(UNITS, return_sequences=True, initial_state=kind)
    outputs = keras.layers.Dense(1)(lstm(inputs, initial_state=state))
    model = keras.Model([forces, given], outputs)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * TRAINING // BATCH)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), "mse")
    return model


def errors(context: str, start: str, seed: int) -> dict[str, float]:
    """Trains a model; returns root mean squared errors, and seconds.

    Errors are relative to the standard deviation of the test positions.
    """
    training, test = make_data(context, seed)
    model = make_model(context, start, training, seed)
    began = time.perf_counter()
    inputs = [training.forces, training.context]
    model.fit(inputs, training.positions, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - began
    predicted = model.predict([test.forces, test.context], batch_size=256, verbose=0)
    squared = np.square(predicted - test.positions).mean(axis=(0, 2)) / test.positions.var()
    ranges = {"all": slice(None), "1-10": slice(10), "41-50": slice(40, None)}
    found = {name: round(float(np.sqrt(squared[at].mean())), 4) for name, at in ranges.items()}
    return {**found, "parameters": model.count_params(), "seconds": round(seconds, 1)}


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown: the mean over seeds of the error, all steps."""
    names = {
        "zeros": "zeros",
        "constant": "learned constant",
        "context_state": "`ContextState`",
        "context_state_noise": f"`ContextState`, noise {NOISE}",
        "appended": "context appended to every input",
        "both": "`ContextState` and appended",
    }
    lines = ["| start | " + " | ".join(CONTEXTS) + " |", "|---|" + "---|" * len(CONTEXTS)]
    for start in STARTS:
        cells = []
        for context in CONTEXTS:
            values = [run["all"] for run in results.get(context, {}).get(start, [])]
            if not values:
                cells.append("not run")
                continue
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {names[start]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="context_states", help="name of the JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=CONTEXTS, help="the JSON keeps the others")
    args = parser.parse_args()
    out = Path("benchmarks/results") / f"{args.out}.json"
    results = json.loads(out.read_text())["results"] if args.only and out.exists() else {}
    for context in [args.only] if args.only else CONTEXTS:
        results[context] = {"cpu": facts()["cpu"]} | {start: [] for start in STARTS}
        for seed in range(args.seeds):
            for start in STARTS:
                found = errors(context, start, seed)
                print(context, start, seed, found, flush=True)
                results[context][start].append(found)
        write_results(args.out, facts(), results)
    print(table(results))


if __name__ == "__main__":
    main()
