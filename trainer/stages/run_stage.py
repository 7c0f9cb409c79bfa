"""Runs a stage in this process, from the checks before it to the report after it."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import absl.logging
import tensorflow as tf

from data_pipelines.durable import make_folder
from data_pipelines.errors import InputError, raise_if
from data_pipelines.files import is_remote
from data_pipelines.store.fetch import fetched
from data_pipelines.store.manifest import read_manifest
from data_pipelines.store.token_store import TokenStore
from trainer import native, preflight
from trainer.config import Config
from trainer.distribution import run_lock
from trainer.distribution.cluster import Cluster
from trainer.distribution.distributor import Distributor
from trainer.distribution.make import make_distributor
from trainer.distribution.preemption import Preempted, StopRequest
from trainer.mirror import mirrored
from trainer.models import bundle
from trainer.report_page import html
from trainer.reporting import environment, report_file
from trainer.reporting.console import Console
from trainer.reporting.status_server import Vitals, serving
from trainer.reporting.trackers import following, make_trackers
from trainer.safe_files import replace_text
from trainer.stages import compare, evaluate, finetune, lr_range, pretrain, replay
from trainer.training import precision
from trainer.training.run import Run


def run_stage(config: Config, cluster: Cluster, log: Callable[[str], None] | None = None) -> None:
    """Runs the stage; the chief holds the lock of the run's folder meanwhile.

    Args:
        log: Takes the lines of a single process; default: print them.

    Raises:
        InputError: The flags, the data or a file that they name are wrong, or another run uses the
            folder.
        Preempted: A worker received TERM; the state is saved.
        BehindError: --mirror lacks the last state.
    """
    vitals = Vitals(stall_seconds=config.stall_seconds)
    folder, say = Path(config.run_dir), log or print
    writes = cluster.rank == 0 and config.stage != "replay"
    with contextlib.ExitStack() as held:
        # Undone after it: what the caller exports from this process must load elsewhere.
        held.callback(native.use_in_inference, native.use_in_inference())
        if writes:
            held.enter_context(run_lock.held(folder, say))
        url, is_new = config.mirror if writes else "", config.resume == "never"
        saved = held.enter_context(mirrored(url, folder, is_new, say))
        if cluster.is_first_of_host and config.status_port:
            held.enter_context(serving(config.status_host, config.status_port, vitals))
        _run_stage(config, cluster, log, vitals, saved)


def _run_stage(
    config: Config,
    cluster: Cluster,
    log: Callable[[str], None] | None,
    vitals: Vitals,
    saved: Callable[[], None],
) -> None:
    """Checks, prepares the data, makes the distributor, runs the stage, writes the report."""
    began = time.perf_counter()
    chief = cluster.rank == 0
    config_folder = Path(config.run_dir)
    if config.stage == "replay":
        config_folder, config = replay.folder_of_run(config), replay.config_of_run(config)
    writes = chief and not config.step
    console = Console(sys.stdout, os.environ, is_silent=not chief)
    log = log or console
    faults = preflight.bundle_faults(config) if chief else []
    config = preflight.with_labels_of_bundle(config)
    raise_if(faults + (preflight.resume_faults(config, config_folder) if writes else []))
    which_loops = loops(config)  # before the data are prepared: WARMSTATE_NATIVE may be wrong
    store = open_store(config, cluster, log)
    read = preflight.vocabulary_faults(config, store.vocab_sha256) if chief else []
    raise_if(preflight.store_faults(config, store) + read)
    if writes:
        remember_config(config)
    for line in (f"data: {store.note}" if store.note else "", which_loops):
        if line:
            log(line)
    absl.logging.set_verbosity(absl.logging.WARNING)
    turn_on_determinism()
    distributor = make_distributor(config.distributor, cluster, config.collective_timeout_seconds)
    stop_request = StopRequest(("TERM", config.preemption_signal), config.grace_seconds)
    config = precision.resolved(config, distributor, config_folder, log)
    config = exact_if_small(config, store.vocab_size, log)
    trackers = make_trackers(config.track, log) if writes else []
    run = Run(config, distributor, store, stop_request, log, vitals, trackers, saved)
    if config.step:
        with _together(distributor):
            replayed = replay.replay(run)
        log("\n".join(["", *replay.describe(replayed, distributor.num_shards)]))
        return
    with following(trackers, run.folder, dataclasses.asdict(config)):
        with console, _faults_of_reading(store), _together(distributor):
            result = _result(run)
        if chief:
            write_report(run, result, time.perf_counter() - began)


@contextlib.contextmanager
def _together(distributor: Distributor) -> Iterator[None]:
    """Waits at the end for all workers, which may still receive what this one sent."""
    try:
        yield
    except Preempted:  # in all workers, after the same collective
        distributor.watchdog.leave()
        raise
    distributor.watchdog.leave()


@contextlib.contextmanager
def _faults_of_reading(store: TokenStore) -> Iterator[None]:
    """Raises what ended a read at the store's address; in a batch it is TensorFlow's error."""
    try:
        yield
    except tf.errors.OpError:
        if store.remote and store.remote.fault:
            raise store.remote.fault from None
        raise


def loops(config: Config) -> str:
    """Returns a line about the loops that the LSTM layers run."""
    if not native.has_gpu():
        return native.hint()
    kept = "; it keeps all activations in spite of --recompute" if config.recompute else ""
    clips = config.finetune_recurrent_clip_norm
    slow = "; fine-tuning goes step by step, for --finetune_recurrent_clip_norm" if clips else ""
    return f"lstm: cuDNN{kept}{slow}"


def exact_if_small(config: Config, vocab_size: int, log: Callable[[str], None]) -> Config:
    """Returns the configuration with an exact softmax if it has too few words to sample from."""
    if not config.uses_softmax or config.sampled_softmax < vocab_size:
        return config
    log(
        f"softmax: exact, because the vocabulary has {vocab_size} words, not more than the "
        f"default of --sampled_softmax={config.sampled_softmax}"
    )
    return dataclasses.replace(config, sampled_softmax=0)


def turn_on_determinism() -> None:
    """Makes operations deterministic; call it before any operation runs.

    On a GPU TensorFlow would run deterministic scatters on the host and copy whole tables there and
    back in every step. Ours name each row once, so they are deterministic on the GPU as well.
    """
    os.environ.setdefault("TF_DISABLE_SCATTER_OP_DETERMINISM", "true")
    tf.config.experimental.enable_op_determinism()


def _result(run: Run) -> dict[str, Any]:
    """Runs the stage; returns its part of the report."""
    config, folder = run.config, run.folder
    if config.lr_range:
        return {"lr_range": lr_range.measure(run, folder)}
    if config.stage == "pretrain":
        return {"pretrain": pretrain.pretrain(run, folder)}
    if config.stage == "finetune":
        return {"finetune": finetune.finetune(run, folder)}
    if config.stage == "evaluate":
        split = config.evaluate_split
        return {split: evaluate.evaluate(run, Path(config.classifier), split, folder)}
    return compare.compare(run)


def open_store(config: Config, cluster: Cluster, log: Callable[[str], None]) -> TokenStore:
    """Returns the token store, fetched if --store is an address, made from --source if missing.

    Every process may call this at once: the `prepare` program locks the folder. It is a separate
    program because it runs TensorFlow operations, after which this process could no longer make a
    multi-worker strategy.

    Raises:
        InputError: The store is damaged, or cannot be fetched.
    """
    folder, url = config.store or str(Path(config.run_dir) / "store"), ""
    log = log if cluster.rank == 0 else lambda line: None
    if is_remote(config.store):
        folder = str(fetched(config.store, log, config.store_cache_bytes))
        url = config.store if config.store_cache_bytes else ""
    elif not config.store or not (Path(config.store) / "manifest.json").exists():
        command = [sys.executable, "-m", "data_pipelines.prepare", f"--out={folder}"]
        command += _vocabulary_flags(config, Path(folder))
        sources = {name: getattr(config, name) for name in ("source", "unlabelled", "labelled")}
        if not any(sources.values()):
            sources["source"] = "movie_reviews"
        given = {**sources, "data_dir": config.data_dir, "context_key": config.context_key}
        given["labels"] = "" if config.labels == Config.labels else config.labels
        command += [f"--{name}={value}" for name, value in given.items() if value]
        quiet = None if cluster.rank == 0 else subprocess.DEVNULL
        variables = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        code = subprocess.run(command, stdout=quiet, env=variables).returncode
        if code:
            sys.exit(code)
    try:
        store = TokenStore(folder, url, log)
        if store.shards_elsewhere:
            log(f"data: the tokens of {store.shards_elsewhere} shards stay at {url}")
        if config.verify and cluster.rank == 0:
            store.verify()
    except OSError as error:
        raise InputError(
            f"--store={folder}: {error.filename} cannot be read: {error.strerror}"
        ) from None
    return store


def _vocabulary_flags(config: Config, folder: Path) -> list[str]:
    """Returns prepare's flags of the vocabulary: that of the bundle which will read the store.

    A store that is there, and whose vocabulary is from its data, as for pretraining, stays.

    Raises:
        InputError: The bundle is missing or damaged.
    """
    flags, size = [f"--tokenizer={config.tokenizer}"], Config.vocab_size
    bundles = preflight.bundles_read(config)[:1]
    if bundles and (folder / "manifest.json").exists():
        given = read_manifest(folder)["prepare_config"].get("vocab_file")
        bundles = bundles if given else []
    for name, flag, of_bundle in bundles:
        info = bundle.read_info(Path(of_bundle), name, flag)
        tokenizer = bundle.tokenizer_config(info, f"{flag}={of_bundle}")
        size = info["model"]["vocab_size"]
        names = {"type": "tokenizer", "lowercase": "lowercase"}
        flags = [f"--{names[key]}={tokenizer[key]}" for key in names if key in tokenizer]
        flags.append(f"--vocab_file={Path(of_bundle) / 'vocab.txt'}")
    if config.vocab_size not in (Config.vocab_size, size):  # the default may exceed the data's
        flags.append(f"--vocab_size={config.vocab_size}")
    return flags


def remember_config(config: Config) -> None:
    """Writes the configuration and the environment to the run's folder, for a resumed run.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = Path(config.run_dir)
    try:
        make_folder(folder)
        for name, values in (
            ("config.json", dataclasses.asdict(config)),
            ("environment.json", environment.describe()),
        ):
            replace_text(folder / name, json.dumps(values, indent=2) + "\n")
        replace_text(folder / "config.cfg", config.as_flagfile())
    except OSError as error:
        raise InputError(
            f"--run_dir={folder} cannot be written: {error.strerror}: make room or make it writable"
        ) from None


def write_report(run: Run, result: dict[str, Any], wall_seconds: float) -> None:
    """Writes report.json and report.html, and prints the result.

    Args:
        result: The stage's part of the report.

    Raises:
        InputError: report.json cannot be written; everything else is done by then.
    """
    report = {
        "stage": run.config.stage,
        "world_size": run.distributor.num_shards,
        "data_note": run.store.note,
        **result,
        "wall_seconds": round(wall_seconds, 1),
        "config": dataclasses.asdict(run.config),
    }
    fault = ""
    try:
        report_file.write(run.folder, report)
    except OSError as error:
        fault = f"{run.folder / 'report.json'} cannot be written: {error.strerror}"
    page = _write_page(run.folder, run.log)
    if os.environ.get("WARMSTATE_PRINT_REPORT"):  # for programs that cannot read the run's folder
        run.log(f"report.json: {json.dumps(report)}")
    for tracker in run.trackers:
        tracker.end("finished", report)
    table = report_file.comparison_table(report) if run.config.stage == "all" else None
    if run.config.lr_range:
        table = lr_range.table(report["lr_range"])
    last = f"\n\nreport: {page}" if page else ""
    run.log(f"\n{table or json.dumps(result, indent=2)}{last}")
    if fault:
        raise InputError(f"{fault}: make room or make it writable, and run the same command again")


def _write_page(folder: Path, log: Callable[[str], None]) -> str:
    """Writes report.html; returns its path, or warns and returns "": it can be drawn later."""
    page = folder / "report.html"
    try:
        html.write([folder], page)
    except Exception as error:  # everything else of the run is done
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        log(
            f"warning: {page} cannot be written: {why}; once it can, "
            f"`python -m trainer.report_page.html {folder}` draws it"
        )
        return ""
    return str(page)
