"""The flags of each program as a table, for help and completion; imports no TensorFlow."""

import dataclasses
from typing import Any, NamedTuple

FLAGFILE = "flagfile"
# Groups of the trainer's flags that a stage has a use for.
_EVERY_RUN = ("Run", "Data", "Model", "Optimization", "Distribution")
STAGE_GROUPS = {
    "all": (*_EVERY_RUN, "Pretraining", "Fine-tuning", "Evaluation"),
    "pretrain": (*_EVERY_RUN, "Pretraining"),
    "finetune": (*_EVERY_RUN, "Fine-tuning"),
    "evaluate": ("Run", "Data", "Evaluation", "Distribution"),
    "replay": ("Run", "Data", "Distribution"),
    "predict": ("Evaluation", "Prediction"),
    "export": ("Evaluation", "Prediction"),
    "serve": ("Evaluation", "Serving"),
}
# Of those, what a stage has no use for.
STAGE_NOT = {
    "predict": ("evaluate_split",),
    "export": ("evaluate_split", "input", "text_key", "explain", "reconstruct"),
    "serve": ("evaluate_split",),
}
# Of other groups, what it has.
STAGE_ALSO = {
    "finetune": (  # of the objective of --joint_weight
        "pretrain_objective",
        "pretrain_dropout",
        "pretrain_word_dropout",
        "pretrain_subsampling",
        "sampled_softmax",
        "tied_softmax",
    ),
    "replay": ("encoder", "backward_encoder"),
    "predict": ("encoder", "pretrain_max_tokens"),
}


class FlagRow(NamedTuple):
    """A flag.

    Attributes:
      kind: of its value: int, float, str or bool.
      default: as the help shows it.
      choices: the values that it may have, if they are few.
    """

    group: str
    name: str
    kind: str
    default: str
    help: str
    choices: tuple[str, ...] = ()


def trainer_flags(stage: str) -> list[FlagRow]:
    """Returns the trainer's flags that `stage` has a use for."""
    from trainer.config import Config, kind_of

    left_out = {"stage", *STAGE_NOT.get(stage, ())}
    return [
        FlagRow(
            item.metadata["group"],
            item.name,
            kind_of(item).__name__,
            f"(default: {item.default!r})",
            item.metadata["help"],
            item.metadata["choices"] or (("true", "false") if item.type is bool else ()),
        )
        for item in dataclasses.fields(Config)
        if (item.metadata["group"] in STAGE_GROUPS[stage] and item.name not in left_out)
        or item.name in STAGE_ALSO.get(stage, ())
    ]


def prepare_flags() -> list[FlagRow]:
    """Returns the flags of `data_pipelines.prepare`."""
    from data_pipelines.prepare import command

    command.define_flags()
    return _absl_flags("Flags", "data_pipelines.prepare.command")


def launch_flags() -> list[FlagRow]:
    """Returns the launcher's flags."""
    from launch import main as _  # noqa: F401

    groups = {
        "launch.main": "Flags",
        "launch.slurm.script": "With --platform=slurm",
        "launch.kubernetes.command": "With --platform=k8s",
    }
    return [row for module, group in groups.items() for row in _absl_flags(group, module)]


def report_flags() -> list[FlagRow]:
    """Returns the flags of `trainer.report_page.html`, whose other words are folders of runs."""
    return [
        FlagRow("Flags", "out", "str", "", "File to write; default: report.html in the first run.")
    ]


def _absl_flags(group: str, module: str) -> list[FlagRow]:
    from absl import flags

    return [
        FlagRow(
            group,
            flag.name,
            "bool" if flag.boolean else flag.flag_type().replace("string", "str"),
            _default(flag.default),
            flag.help,
            ("true", "false") if flag.boolean else (),
        )
        for flag in flags.FLAGS.flags_by_module_dict()[module]
    ]


def _default(value: Any) -> str:
    return "" if value is None else f"(default: {value!r})"
