"""--stage=all: pretrain, fine-tune from the encoder and from scratch, and set them side by side."""

from typing import Any

from trainer.stages.evaluate import evaluate
from trainer.stages.finetune import finetune
from trainer.stages.pretrain import pretrain
from trainer.stages.run import Run


def compare(run: Run) -> dict[str, Any]:
    """Runs the whole job in the run's folder, or the part of it that --starts names.

    Returns:
      The report: pretrain, warm, scratch (as the stages return them), broadcast, and
      test_error_percent of the starts. The test split is read once for each, at the end.
    """
    config, folder = run.config, run.folder
    starts = ("scratch", "warm") if config.starts == "both" else (config.starts,)
    report: dict[str, Any] = {}
    if "warm" in starts:
        report["pretrain"] = pretrain(run, folder / "pretrain")
        report["warm"] = finetune(
            run,
            folder / "warm",
            folder / "pretrain" / "encoder",
            config.init_weights,
            config.initial_state,
        )
        report["broadcast"] = report["warm"].pop("broadcast")
    if "scratch" in starts:
        report["scratch"] = finetune(run, folder / "scratch", None, "random", "zero")
    report["test"] = {
        name: evaluate(run, folder / name / "classifier", "test", folder / name) for name in starts
    }
    report["test_error_percent"] = {
        name: round(values["error_percent"], 3) for name, values in report["test"].items()
    }
    return report
