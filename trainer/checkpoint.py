"""Training state on disk: all that an interrupted run needs to end as if it never stopped.

  CHECKPOINTS/step-00000500/state.safetensors   every variable of the model and the optimizer
  CHECKPOINTS/step-00000500/state.json          the step, the SHA-256, and the loop's own notes

Only the chief reads and writes; the others get the state by broadcast, so they need not share
its file system. The data order is a function of the step and needs no state.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from trainer import bundle
from trainer.distribution.distributor import (
    Distributor,
    broadcast_arrays,
    gather_objects,
    is_chief,
)

KEPT = 2


class Checkpointer:
    """Saves and restores a set of variables in `folder`."""

    def __init__(
        self,
        folder: Path,
        distributor: Distributor,
        variables: Mapping[str, keras.Variable],
        log: Callable[[str], None],
    ):
        self._folder = folder
        self._distributor = distributor
        self._variables = variables
        self._log = log

    def save(
        self, step: int, notes: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Writes the state after `step` steps.

        Args:
          notes: of the loop; anything that JSON can hold.
          arrays: further tensors to keep beside the variables.
        """
        if not is_chief(self._distributor):
            return
        tensors = bundle.values(self._variables) | {f"+{k}": v for k, v in (arrays or {}).items()}
        beside = self._folder / "unfinished"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "state.safetensors").write_bytes(safetensors.numpy.save(tensors))
        state = {"step": step, "sha256": bundle.digest(tensors), "notes": dict(notes)}
        (beside / "state.json").write_text(json.dumps(state) + "\n")
        bundle.replace_folder(beside, self._folder / f"step-{step:08d}")
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)

    def forget(self) -> None:
        """Removes all checkpoints, for a run that starts again."""
        if is_chief(self._distributor):
            shutil.rmtree(self._folder, ignore_errors=True)

    def restore(self) -> tuple[int, dict[str, Any], dict[str, np.ndarray]] | None:
        """Sets the variables to the newest good checkpoint; a collective.

        Returns:
          (step, notes, arrays) as they were saved, arrays in the chief only; None where there is
          no checkpoint.
        """
        found = self._read_newest() if is_chief(self._distributor) else None
        state = gather_objects(self._distributor, found and found[0])[0]
        if state is None:
            return None
        tensors = found[1] if found else {}
        mine = {k: v for k, v in tensors.items() if not k.startswith("+")}
        bundle.assign(self._variables, broadcast_arrays(self._distributor, mine if found else None))
        kept = {k[1:]: v for k, v in tensors.items() if k.startswith("+")}
        return state["step"], state["notes"], kept

    def _steps(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))

    def _read_newest(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        for folder in reversed(self._steps()):
            try:
                state = json.loads((folder / "state.json").read_text())
                tensors = safetensors.numpy.load_file(folder / "state.safetensors")
                if bundle.digest(tensors) == state["sha256"]:
                    return state, tensors
                fault = "its SHA-256 does not match"
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                fault = str(error)
            self._log(f"checkpoint {folder} is damaged ({fault}); trying the one before")
        return None
