"""One step of a run, run again to look at it.

From the newest checkpoint before it, with the same data and seeds, on the same number of shards:
then its numbers are the same to the last bit. Nothing is written.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

SHOWN_GRADIENTS = 10


class Replayed(Exception):
    """The step was run again; the argument says how it went, as `replay` returns it."""


def replay(
    step: int,
    names: Iterable[str],
    restore: Callable[[], tuple[int, dict[str, Any], Any] | None],
    batches: Any,
    train_step: Callable[[Any, int], Any],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the steps from the newest checkpoint before `step` up to it; a collective.

    Args:
      step: counted from 1, as in the log.
      names: of the variables, in the order of the outcome's norms.
      restore: sets the state to the newest one before `step`, as Checkpointer.restore.
      batches: as `loop.train` takes them; where it has `texts(step)`, the batch is shown.
      train_step: (batch, number of the step) -> Outcome.

    Returns:
      step, start_step, shards_of_the_run, loss, global_norm, the norms of the gradients by
      variable, the largest first, and the examples of the batch, number -> text.
    """
    restored = restore()
    start, notes = restored[:2] if restored else (0, {})
    log(f"replay: from {f'the checkpoint of step {start}' if start else 'the start'} to {step}")
    for number, batch in enumerate(batches(start, step), start + 1):
        outcome = train_step(batch, number)
        log(f"replay: step {number} · loss {float(outcome.loss):.9g}")
    norms = dict(zip(names, outcome.norms.numpy().tolist(), strict=True))
    # Those that are not finite come first.
    largest = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))
    return {
        "step": step,
        "start_step": start,
        "shards_of_the_run": notes.get("shards"),
        "loss": float(outcome.loss),
        "global_norm": math.hypot(*norms.values()),
        "gradient_norms": {name: norms[name] for name in largest},
        "examples": batches.texts(step - 1) if hasattr(batches, "texts") else {},
    }


def describe(replayed: dict[str, Any], shards: int) -> list[str]:
    """Returns the lines that a replay ends with.

    Args:
      shards: of this process group.
    """
    lines = [
        f"step {replayed['step']} · loss {replayed['loss']:.9g} · global norm of the gradients "
        f"{replayed['global_norm']:.9g}"
    ]
    of_the_run = replayed["shards_of_the_run"]
    if of_the_run not in (None, shards):
        lines.append(
            f"warning: the run had {of_the_run} shards, this has {shards}: random draws differ, as "
            "dropout's; start as many"
        )
    lines.append("largest gradients by their norm, before clipping:")
    shown = list(replayed["gradient_norms"].items())[:SHOWN_GRADIENTS]
    lines += [f"  {norm:.6g}  {name}" for name, norm in shown]
    lines.append("examples of the batch:")
    lines += [f"  {number}: {text}" for number, text in replayed["examples"].items()]
    return lines
