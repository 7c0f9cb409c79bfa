"""Everything that can be wrong before any training: all faults at once, each with its remedy.

`faults_of` needs the flags alone; the others read bundles, the store or the run's folder.
"""

import contextlib
import dataclasses
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines import flag_fields
from data_pipelines.errors import InputError
from data_pipelines.files import is_remote
from data_pipelines.object_store import address_fault
from data_pipelines.sources.rows import kind_and_path
from data_pipelines.store.token_store import TokenStore
from trainer.config import FREE_ON_RESUME, USING_STAGES, Config, rate_range, step_range
from trainer.distribution.cluster import Cluster, distributor_faults
from trainer.reporting import trackers
from trainer.safe_files import DamagedError, read_json


def faults_of(config: Config, cluster: Cluster) -> list[str]:
    """Returns every fault of the configuration that needs no data to be seen, one line each."""
    return flag_fields.all_faults(config, lambda readable: _faults(readable, cluster))


def _faults(config: Config, cluster: Cluster) -> list[str]:
    faults = _address_faults(config) + _run_dir_faults(config)
    if config.stage in USING_STAGES:
        return [*faults, *_using_faults(config, cluster)]
    return [
        *faults,
        *_object_store_faults(config),
        *trackers.faults_of(config.track),
        *distributor_faults(config.distributor, cluster),
        *_batch_size_faults(config, cluster),
        *_pretraining_faults(config),
        *_step_faults(config),
        *_finetuning_faults(config),
        *_frozen_faults(config),
        *_label_set_faults(config),
        *_refit_faults(config),
        *_stage_faults(config),
    ]


def _address_faults(config: Config) -> list[str]:
    """Returns a fault for each folder that is an address; docs/decisions.md says why."""
    return [
        f"--{name}={getattr(config, name)} is an address: it must be a folder of a file system, on "
        "which files are flushed and renamed; train in a local one or a volume; --mirror copies a "
        "run to an object store"
        for name in (*("run_dir", "encoder", "backward_encoder", "classifier", "task", "tasks"),)
        if "://" in getattr(config, name)
    ]


def _folder_faults(flag: str, folder: str) -> list[str]:
    """Returns a fault if `folder` cannot be written or made."""
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        return [f"{flag}={folder} is a file; name a folder"]
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return []
    except OSError as error:
        return [f"{flag}={folder} cannot be written: {existing}: {error.strerror}"]


def _run_dir_faults(config: Config) -> list[str]:
    """Returns a fault if the stage writes a run's folder and cannot; see `_address_faults`."""
    if config.stage in USING_STAGES or "://" in config.run_dir:
        return []
    if not config.run_dir:
        return ["--run_dir is not set: name the folder that the run may write"]
    return [] if config.stage == "replay" else _folder_faults("--run_dir", config.run_dir)


def _object_store_faults(config: Config) -> Iterator[str]:
    """Yields addresses that cannot be used: of no form, or without the driver of their scheme."""
    for name in ("mirror", "store"):
        url = getattr(config, name)
        must_be = is_remote(url) or (url and name == "mirror")
        if must_be and (fault := address_fault(url)):
            yield f"--{name}={url} {fault}"
    if config.store_cache_bytes and not is_remote(config.store):
        yield (
            f"--store_cache_bytes={config.store_cache_bytes} needs a --store at an address, such "
            "as s3://bucket/store"
        )


def _batch_size_faults(config: Config, cluster: Cluster) -> Iterator[str]:
    """Yields global batches that are too small for so many workers."""
    for stage in ("pretrain", "finetune"):
        name = f"{stage}_batch_size"
        if config.stage in ("all", stage) and getattr(config, name) < cluster.size:
            yield (
                f"--{name}={getattr(config, name)} is smaller than the number of workers, "
                f"{cluster.size}: some would have nothing to do"
            )


def _together(config: Config, name: str, other: str, why: str) -> str:
    """Returns the fault of two flags that do not go together."""
    values = [f"--{each}={getattr(config, each)}" for each in (name, other)]
    return f"{values[0]} with {values[1]}: {why}"


def _pretraining_faults(config: Config) -> Iterator[str]:
    """Yields which flags of pretraining do not go together."""
    together = partial(_together, config)
    if config.samples_at_least(config.vocab_size):
        yield (
            f"--sampled_softmax={config.sampled_softmax} must be below --vocab_size="
            f"{config.vocab_size}; 0 is the exact softmax"
        )
    tokens = config.pretrain_tokens_per_batch
    if tokens and tokens < config.pretrain_max_tokens:
        yield (
            f"--pretrain_tokens_per_batch={tokens} must be at least --pretrain_max_tokens="
            f"{config.pretrain_max_tokens}, the longest row; 0 counts rows instead"
        )
    packing, objective = config.pretrain_packing, config.pretrain_objective
    if tokens and packing != "none":
        why = "its rows have one length; set --pretrain_batch_size instead"
        yield together("pretrain_tokens_per_batch", "pretrain_packing", why)
    if config.reconstruct_documents and objective != "sequence_autoencoder":
        why = "only a sequence_autoencoder writes texts again"
        yield together("reconstruct_documents", "pretrain_objective", why)
    if packing == "stream" and objective != "language_model":
        why = "only a language model carries its state from row to row; use concat or none"
        yield together("pretrain_packing", "pretrain_objective", why)
    if objective != "bag_autoencoder":
        return
    if packing != "none":
        why = "a bag holds one document's words, so each row must be one document; use none"
        yield together("pretrain_packing", "pretrain_objective", why)
    if config.pretrain_subsampling:
        why = "the bag weights words by inverse document frequency already; use 0"
        yield together("pretrain_subsampling", "pretrain_objective", why)


def _step_faults(config: Config) -> Iterator[str]:
    """Yields which flags of steps do not go together."""
    if config.lr_range and rate_range(config.lr_range) is None:
        yield f"--lr_range={config.lr_range} must be LOW:HIGH, two rates, as in --lr_range=1e-5:1"
    for name, value, why in (
        ("stage", config.stage, "use --stage=pretrain or --stage=finetune"),
        ("steps_per_call", config.steps_per_call, "it skips non-finite steps; use 1"),
    ):
        if config.lr_range and value not in ("pretrain", "finetune", 1):
            yield f"--lr_range={config.lr_range} with --{name}={value}: {why}"
    if config.profile_steps and step_range(config.profile_steps) is None:
        yield (
            f"--profile_steps={config.profile_steps} must be A:B, two step numbers from 1, A at "
            "most B, as in --profile_steps=20:30"
        )
    several = partial(_together, config, "steps_per_call")
    if config.steps_per_call > 1 and config.on_nonfinite == "skip":
        why = "whether a step is left out is decided after each; set --steps_per_call=1"
        yield several("on_nonfinite", f"{why} or --on_nonfinite=stop")
    if config.steps_per_call > 1 and config.precision == "mixed_float16":
        why = "a step that overflows is tried again; set --steps_per_call=1"
        yield several("precision", f"{why} or --precision=mixed_bfloat16")
    if config.steps_per_call > 1 and config.finetune_ema:
        why = "the weights are averaged after each step; set one of them back"
        yield several("finetune_ema", why)


def _finetuning_faults(config: Config) -> Iterator[str]:
    """Yields which flags of fine-tuning do not go together."""
    together = partial(_together, config)
    for name in ("encoder_frozen_steps", "unfreeze_every_steps"):
        if config.optimizer == "adamw" and getattr(config, name):
            why = "its weight decay would move the frozen weights; use --optimizer=adam"
            yield together(name, "optimizer", why)
    if config.finetune_recurrent_clip_norm and config.precision == "mixed_float16":
        why = "it would clip gradients that the loss scale has multiplied; use mixed_bfloat16"
        yield together("finetune_recurrent_clip_norm", "precision", why)
    if config.label_gain == "linear" and config.pooling != "last":
        why = "a label after every word is predicted from that word's output; use --pooling=last"
        yield together("label_gain", "pooling", why)
    is_head_alone = config.hidden_units == 0 and config.init_weights == "encoder"
    if not config.finetune_steps and not is_head_alone:
        yield (
            "--finetune_steps=0 keeps a linear head as logistic regression leaves it: set "
            "--hidden_units=0 and --init_weights=encoder, or take some steps"
        )
    if config.self_training_documents and not is_head_alone:
        yield (
            f"--self_training_documents={config.self_training_documents} is for a warm start's "
            "linear head: set --hidden_units=0 and --init_weights=encoder, or leave it out"
        )
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", config.label_counts, re.ASCII):
        yield f"--label_counts={config.label_counts} must be numbers above 0, such as 200,1000"
    vectors = config.init_embeddings
    if vectors and "://" not in vectors and not Path(vectors).is_file():
        yield f"--init_embeddings={vectors} is not a file"
    if vectors and config.stage == "finetune" and config.init_weights == "encoder":
        why = "the encoder has embeddings; set --init_weights=random, or leave one out"
        yield together("init_embeddings", "init_weights", why)
    if config.unlabelled_batch_size and not config.virtual_adversarial_weight:
        yield (
            f"--unlabelled_batch_size={config.unlabelled_batch_size} needs "
            "--virtual_adversarial_weight: no other loss reads documents without labels"
        )


def _frozen_faults(config: Config) -> Iterator[str]:
    """Yields flags of fine-tuning that do not go with a frozen encoder."""
    if config.train == "all" or config.stage not in ("all", "finetune"):
        return
    for name, is_wrong, why in (
        ("init_weights", config.init_weights == "random", "random weights would stay random; use "
         "--init_weights=encoder"),
        ("initial_state", config.initial_state == "encode", "a task has one state; use zero, mean "
         "or learned"),
        ("context_key", config.context_key, "a task has one state for all documents; use "
         "--train=all"),
        ("joint_weight", config.joint_weight, "joint training trains the encoder; use --train=all"),
        ("backward_encoder", config.backward_encoder, "a task belongs to one encoder; leave it "
         "out, or use --train=all"),
    ):  # fmt: skip
        if is_wrong:
            yield _together(config, "train", name, why)


def _label_set_faults(config: Config) -> Iterator[str]:
    """Yields flags of fine-tuning that do not go with --labels=multi."""
    if config.labels != "multi" or config.stage not in ("all", "finetune"):
        return
    if config.train != "all":
        yield (
            f"--labels=multi with --train={config.train}: a task answers one label; use --train=all"
        )
    if config.self_training_documents:
        yield (
            "--labels=multi with --self_training_documents="
            f"{config.self_training_documents}: it guesses one label a document; leave it out"
        )
    if config.label_counts:
        yield (
            f"--labels=multi with --label_counts={config.label_counts}: its linear models answer "
            "one label; leave it out"
        )


def _refit_faults(config: Config) -> Iterator[str]:
    """Yields flags that do not go with --finetune_refit, which evaluates nothing."""
    if not config.finetune_refit:
        return
    if config.stage == "all":
        yield _together(
            config, "finetune_refit", "stage", "a refit follows the choices; use --stage=finetune"
        )
    for name, is_wrong, why in (
        ("labels", config.labels == "multi", "validation chooses the thresholds"),
        ("finetune_early_stopping", config.finetune_early_stopping, "validation would end it"),
        ("keep_best", config.keep_best, "validation ranks them"),
    ):
        if is_wrong:
            yield _together(config, "finetune_refit", name, f"{why}; leave one out")


def _stage_faults(config: Config) -> Iterator[str]:
    """Yields which flags do not go together with the stage or with each other."""
    pair = (config.unlabelled, config.labelled)
    if any(pair) and (config.source or not all(pair)):
        yield (
            f"--source={config.source} --unlabelled={pair[0]} --labelled={pair[1]}: give either "
            "--source, or both --unlabelled and --labelled"
        )
    if config.stage == "finetune" and not config.encoder and config.needs_encoder:
        why = (
            "--init_weights=encoder"
            if config.init_weights == "encoder"
            else f"--initial_state={config.initial_state}"
        )
        yield (
            f"{why} needs an encoder: set --encoder to a bundle that --stage=pretrain wrote, or "
            "train from scratch with --init_weights=random --initial_state=zero"
        )
    for name in ("encoder", "backward_encoder"):
        if config.stage == "all" and getattr(config, name):
            yield f"--stage=all trains a new encoder: leave --{name} out"
    if config.stage == "all" and config.pretrain_direction == "backward":
        yield (
            "--pretrain_direction=backward with --stage=all, whose classifier reads forward: "
            "pretrain with --stage=pretrain, and give the encoder to fine-tuning as "
            "--backward_encoder"
        )
    if config.stage == "finetune" and config.backward_encoder and not config.needs_encoder:
        yield (
            f"--backward_encoder={config.backward_encoder} is not read with --init_weights=random "
            "--initial_state=zero: leave it out, or take weights or a state from encoders"
        )
    if config.stage == "evaluate" and not config.classifier:
        yield "--stage=evaluate needs --classifier: a bundle that --stage=finetune wrote"
    if (config.stage == "replay") != (config.step > 0):
        yield (
            f"--step={config.step} with --stage={config.stage}: replay needs a step, counted from "
            "1, and nothing else takes one"
        )


def _using_faults(config: Config, cluster: Cluster) -> Iterator[str]:
    """Yields the faults of a stage that uses a trained model."""
    stage = config.stage
    if cluster.size > 1:
        yield f"--stage={stage} is for one process; the environment names {cluster.size}"
    if config.reconstruct and not (config.encoder and stage == "predict"):
        yield "--reconstruct needs --stage=predict and --encoder, an encoder bundle"
    if config.reconstruct and config.explain:
        yield "--reconstruct and --explain: choose one"
    for other in ("explain", "reconstruct"):
        if config.stream and getattr(config, other):
            yield f"--stream and --{other}: choose one"
    flag = "tasks" if stage == "serve" else "task"
    tasks = getattr(config, flag) if stage != "export" else ""
    if tasks and not config.encoder:
        yield f"--{flag}={tasks} needs --encoder, the encoder bundle that it was trained on"
    if tasks and (config.classifier or config.reconstruct):
        other = "--reconstruct" if config.reconstruct else f"--classifier={config.classifier}"
        yield f"--{flag}={tasks} and {other}: choose one"
    if not (config.classifier or config.reconstruct or tasks):
        yield (
            f"--stage={stage} needs --classifier: a bundle that --stage=finetune wrote"
            + ("" if stage == "export" else f"; or --encoder and --{flag}")
        )
    if stage == "export" and not (config.output or config.hub_dir):
        yield (
            "--stage=export needs --output, the folder that the model is written to, or --hub_dir, "
            "the one for a model hub"
        )
    missing = [n for n in ("starlette", "uvicorn") if importlib.util.find_spec(n) is None]
    if stage == "serve" and missing:
        yield (
            f"--stage=serve needs {' and '.join(missing)}: pip install -c constraints.txt "
            "-e '.[serve]' in a clone of warmstate"
        )
    if (config.explain or config.reconstruct) and kind_and_path(config.output)[0] in ("csv", "tsv"):
        flag = "explain" if config.explain else "reconstruct"
        yield f"--{flag} with --output={config.output}: choose text or jsonl"
    if stage == "predict" and config.output.endswith((".gz", ".zst")):
        yield f"--output={config.output}: what is written is not compressed; name it so"


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Returns one line for each flag in which a resumed run differs from `saved`."""
    return [
        f"--{name} was {saved[name]!r} and is now {value!r}"
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_ON_RESUME and name in saved and saved[name] != value
    ]


def encoders_of(config: Config) -> list[tuple[str, str, str]]:
    """Returns flag, folder and direction of the encoder bundles that --stage=finetune reads."""
    if config.stage != "finetune" or not config.needs_encoder:
        return []
    found = [("--encoder", config.encoder, "forward")]
    if config.backward_encoder:
        found.append(("--backward_encoder", config.backward_encoder, "backward"))
    return found


def bundles_read(config: Config) -> list[tuple[str, str, str]]:
    """Returns name, flag and folder of the bundles that read the store's tokens."""
    found = [("encoder", flag, folder) for flag, folder, _ in encoders_of(config)]
    if config.stage == "evaluate":
        found.append(("classifier", "--classifier", config.classifier))
    return found


def bundle_faults(config: Config) -> list[str]:
    """Returns why bundles that flags name cannot be used with this model."""
    from trainer.models import bundle

    faults: list[str] = []
    for flag, folder, direction in encoders_of(config):
        with _added_to(faults):
            info = bundle.read_info(Path(folder), "encoder", flag)
            model, reads = info["model"], info.get("direction", "forward")
            if reads != direction:
                faults.append(
                    f"{flag}={folder} reads {reads}: --encoder needs a bundle that reads forward, "
                    "--backward_encoder one trained with --pretrain_direction=backward"
                )
            faults += [
                f"--{name}={getattr(config, name)}, but the encoder in {flag}={folder} "
                f"has {model[name]}; set --{name}={model[name]}"
                for name in ("embedding_dim", "units", "num_layers")
                if getattr(config, name) != model[name]
            ]
    if config.stage == "evaluate":
        with _added_to(faults):
            if config.labels == "multi" != _labels_of_bundle(config):
                faults.append(
                    f"--labels=multi, but --classifier={config.classifier} was trained with "
                    "--labels=single"
                )
    return faults


def with_labels_of_bundle(config: Config) -> Config:
    """Returns the configuration with the --labels of the classifier that --stage=evaluate reads."""
    is_there = (Path(config.classifier) / "classifier.json").exists()  # only the chief needs it
    if config.stage != "evaluate" or not is_there:
        return config
    return dataclasses.replace(config, labels=_labels_of_bundle(config))


def _labels_of_bundle(config: Config) -> str:
    from trainer.models import bundle

    info = bundle.read_info(Path(config.classifier), "classifier", "--classifier")
    return "multi" if info["model"].get("multi_label") else "single"


def resume_faults(config: Config, folder: Path) -> list[str]:
    """Returns why --resume=auto cannot continue the run in `folder`, if there is one."""
    path = folder / "config.json"
    if config.resume != "auto" or not path.exists():
        return []
    try:
        saved = read_json(path)
    except DamagedError as error:
        return [
            f"--run_dir={folder}: {error}. The file records the run's flags: remove it if they are "
            "the same, or start again with --resume=never"
        ]
    trained = saved.get("stage", "evaluate")
    if config.stage == "evaluate" != trained:
        return [
            f"--run_dir={folder} holds a run of --stage={trained}, whose report this one would "
            "replace; name another --run_dir"
        ]
    return [
        f"--run_dir={folder} holds a run of other settings: {line}; name another --run_dir, or "
        "start again with --resume=never"
        for line in differences(config, saved)
    ]


def store_faults(config: Config, store: TokenStore) -> list[str]:
    """Returns which flags ask for something that the store does not have."""
    faults = []
    if config.stage in ("all", "finetune"):
        wanted, there = config.finetune_documents, len(store.split("train"))
        if wanted > there:
            faults.append(
                f"--finetune_documents={wanted} is more than the {there} labelled documents that "
                "the store has for training; 0 takes all"
            )
        for count in config.counts_of_labels:
            if count >= there:
                faults.append(
                    f"--label_counts has {count}, but the store has {there} labelled documents for "
                    "training; all of them are compared anyway"
                )
        if config.unlabelled_batch_size and "unsupervised" not in store.splits:
            faults.append(
                f"--unlabelled_batch_size={config.unlabelled_batch_size}, but the store has no "
                "unsupervised split: leave it out, or name a --store with unlabelled text"
            )
    found = store.manifest["prepare_config"].get("context_key", "")
    if config.context_key and config.context_key != found:
        faults.append(
            f"--context_key={config.context_key}, but the store's is {found or 'not set'}: prepare "
            "another --store with it"
        )
    labels = "single" if store.label_sets is None else "multi"
    if config.stage != "pretrain" and config.labels != labels:
        faults.append(
            f"--labels={config.labels}, but the store was prepared with --labels={labels}: set it, "
            "or prepare another --store"
        )
    kind = store.tokenizer_config["type"]
    if config.tokenizer not in ("word", kind):
        faults.append(f"--tokenizer={config.tokenizer}, but the store's is {kind}")
    if config.samples_at_least(store.vocab_size):
        faults.append(
            f"--sampled_softmax={config.sampled_softmax} must be below the store's vocabulary of "
            f"{store.vocab_size}; 0 is the exact softmax"
        )
    return faults


def vocabulary_faults(config: Config, vocab_sha256: str) -> list[str]:
    """Returns which bundles were made with a vocabulary other than the store's."""
    from trainer.models import bundle

    faults = []
    for name, flag, folder in bundles_read(config):
        theirs = bundle.read_info(Path(folder), name, flag)["vocab_sha256"]
        if theirs != vocab_sha256:
            faults.append(
                f"{flag}={folder} was made with another vocabulary (SHA-256 {theirs[:12]}) than "
                f"the store's ({vocab_sha256[:12]}): name the --store that it was trained on, or "
                f"prepare other text with --vocab_file={folder}/vocab.txt"
            )
    return faults


@contextlib.contextmanager
def _added_to(faults: list[str]) -> Iterator[None]:
    """Adds the InputError that its block raises to `faults`."""
    try:
        yield
    except InputError as error:
        faults.append(str(error))
