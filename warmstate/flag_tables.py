"""The flags of each command, for help and completion; imports no TensorFlow."""

from dataclasses import dataclass

from data_pipelines.flag_fields import Field, fields_of, flag

# Groups of the trainer's flags that a stage reads.
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
# Flags of those groups that a stage does not read.
STAGE_NOT = {
    "predict": ("evaluate_split", "hub_dir", "hub_licence"),
    "export": ("evaluate_split", "input", "text_key", "explain", "stream", "task", "reconstruct"),
    "serve": ("evaluate_split",),
}
# Flags of other groups that a stage reads.
STAGE_ALSO = {
    "finetune": (  # for the objective of --joint_weight
        *("pretrain_objective", "pretrain_dropout", "pretrain_word_dropout"),
        *("pretrain_subsampling", "sampled_softmax", "tied_softmax"),
    ),
    "evaluate": ("classify_max_tokens",),
    "replay": ("encoder", "backward_encoder"),
    "predict": ("encoder", "pretrain_max_tokens"),
    "serve": ("encoder",),
}


@dataclass
class _Report:
    out: str = flag("Flags", "", "File to write. Default: report.html in the run's folder.")


def flags_of(name: str, is_stage: bool) -> list[Field]:
    """Returns the flags of a command; if it is a stage of the trainer, those that this reads."""
    if is_stage or name == "demo":
        return _trainer_flags("all" if name == "demo" else name)
    if name == "prepare":
        from data_pipelines.prepare.command import Options

        return list(fields_of([Options]).values())
    if name == "launch":
        from launch.main import TABLES

        return list(fields_of(TABLES).values())
    if name == "sweep":
        from warmstate.sweep import Options as SweepOptions

        return list(fields_of([SweepOptions]).values())
    return list(fields_of([_Report]).values()) if name == "report" else []


def _trainer_flags(stage: str) -> list[Field]:
    from trainer.config import Config

    left_out = {"stage", *STAGE_NOT.get(stage, ())}
    return [
        item
        for name, item in fields_of([Config]).items()
        if (item.metadata["group"] in STAGE_GROUPS[stage] and name not in left_out)
        or name in STAGE_ALSO.get(stage, ())
    ]
