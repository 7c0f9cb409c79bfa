"""warmstate: pretrain a recurrent encoder, hand over its weights and states, fine-tune an LSTM.

  python -m trainer.main --stage=pretrain --run_dir=runs/a --store=runs/store
  python -m trainer.main --stage=finetune --run_dir=runs/b --store=runs/store \\
      --encoder=runs/a/encoder --initial_state=learned
  python -m trainer.main --stage=evaluate --run_dir=runs/c --store=runs/store \\
      --classifier=runs/b/classifier
  python -m trainer.main --stage=replay --run_dir=runs/a --step=120

On several workers: python -m launch.main --platform=local --workers=2 -- FLAGS
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
from absl import app

from data_pipelines import flag_fields
from data_pipelines.errors import InputError
from data_pipelines.quiet_tensorflow import import_quietly
from data_pipelines.store.token_store import TokenStore
from trainer import config as configuration
from trainer import preflight, run_lock
from trainer.config import Config
from trainer.distribution import cluster as clusters
from trainer.distribution.cluster import Cluster
from trainer.distribution.preemption import EXIT_CODE as PREEMPTED_EXIT_CODE
from trainer.distribution.preemption import Preempted
from trainer.reporting.console import Console
from trainer.stages import replay

CONFIGURATION_EXIT_CODE = 2
LOST_WORKER_EXIT_CODE = 75  # EX_TEMPFAIL: the same command may succeed later


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses `argv`; prints the grouped help, or all faults, and exits, if there is cause to."""
    if flag_fields.HELP_WORDS & set(argv[1:]):
        print(flag_fields.program_help(__doc__, [Config]))
        sys.exit(0)
    faults, words = configuration.parse(argv)
    try:
        cluster = clusters.resolve(os.environ)
        faults += preflight.faults_of(configuration.from_flags(), cluster)
    except InputError as error:
        faults.append(str(error))
    if faults:
        _print_faults("\n".join(faults))
        sys.exit(CONFIGURATION_EXIT_CODE)
    return [argv[0], *words]


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags name; exits 2 for bad input, 143 after TERM."""
    config = configuration.from_flags()
    cluster = clusters.resolve(os.environ)
    try:
        if config.stage in configuration.USING_STAGES:
            use_classifier(config, argv[1:])
        else:
            run_stage(config, cluster)
    except InputError as error:
        _print_faults(str(error))
        if cluster.size > 1:
            _exit_at_once(CONFIGURATION_EXIT_CODE)
        sys.exit(CONFIGURATION_EXIT_CODE)
    except Preempted as stop:
        print(stop, flush=True)
        sys.exit(PREEMPTED_EXIT_CODE)


def use_classifier(config: Config, texts: Sequence[str]) -> None:
    """Runs a stage that needs a trained classifier and no data, on the CPU.

    Raises:
      InputError: the classifier, or what it is to be used on, is not as it must be.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # One text gains nothing from a GPU, and what is exported here is to run without one.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import_quietly()
    from trainer import native
    from trainer.inference import export, predict

    if config.stage != "export":
        native.use_in_inference()
    try:
        if config.stage == "serve":
            from trainer.inference import serve

            serve.serve(config)
        elif config.stage == "export":
            print(export.export(Path(config.classifier), Path(config.output)))
        elif config.reconstruct:
            predict.reconstruct(config, texts)
        else:
            predict.predict(config, texts)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_stage(config: Config, cluster: Cluster, say: Callable[[str], None] | None = None) -> None:
    """Runs the stage; the chief holds the lock of the run's folder meanwhile.

    Args:
        say: Takes the lines of a single process, which are otherwise printed.

    Raises:
        InputError: The input is wrong, or another run uses the folder.
    """
    writes = cluster.rank == 0 and config.stage != "replay"
    folder = Path(config.run_dir)
    with run_lock.held(folder, say or print) if writes else contextlib.nullcontext():
        _run_stage(config, cluster, say)


def _run_stage(config: Config, cluster: Cluster, say: Callable[[str], None] | None) -> None:
    """Prepares the data, makes the distributor, runs the stage, writes the report."""
    began = time.perf_counter()
    chief = cluster.rank == 0
    if config.stage == "replay":
        config = replay.config_of_run(config)
    writes = not config.step
    folder = Path(config.run_dir)

    console = Console(sys.stdout, os.environ, is_silent=not chief)
    log = say or console
    # Imported here: flags are checked, and the help is printed, without TensorFlow.
    import_quietly()
    import tensorflow as tf

    from trainer import native
    from trainer.distribution.failures import lost_peer
    from trainer.distribution.make import make_distributor
    from trainer.distribution.preemption import StopRequest
    from trainer.reporting.status_server import Vitals, serve
    from trainer.reporting.trackers import following, make_trackers
    from trainer.stages.run import Run
    from trainer.training.replay import Replayed, describe

    native.use_in_inference()
    if chief:
        preflight.raise_if(
            preflight.bundle_faults(config)
            + (preflight.resume_faults(config, folder) if writes else [])
        )
    vitals = Vitals(stall_seconds=config.stall_seconds)
    if cluster.is_first_of_host and config.status_port:
        serve(config.status_host, config.status_port, vitals)
    store = open_store(config, cluster)
    preflight.raise_if(
        preflight.store_faults(config, store)
        + (preflight.vocabulary_faults(config, store.vocab_sha256) if chief else [])
    )
    if chief and writes:
        remember_config(config, folder)
    if store.note:
        log(f"data: {store.note}")
    if to_do := native.hint():
        log(to_do)

    absl.logging.set_verbosity(absl.logging.WARNING)
    tf.config.experimental.enable_op_determinism()
    try:
        distributor = make_distributor(
            config.distributor, cluster, config.collective_timeout_seconds
        )
        stop_request = StopRequest(("TERM", config.preemption_signal), config.grace_seconds)
        config = with_precision(config, distributor, log)
        trackers = make_trackers(config.track, log) if chief and writes else []
        run = Run(config, distributor, store, stop_request, log, vitals, trackers)
        with following(trackers, folder, dataclasses.asdict(config)):
            with console:
                result = stage_report(run)
            if chief:
                write_report(run, result, time.perf_counter() - began)
    except (InputError, Preempted):
        raise
    except Replayed as done:
        log("\n".join(["", *describe(done.args[0], distributor.num_shards)]))
    except Exception as error:
        reason = lost_peer(error)
        if reason is None and cluster.size == 1:
            raise
        if reason is None:
            traceback.print_exc()
        else:
            print(f"worker {cluster.rank} lost a peer: {reason}")
        _exit_at_once(1 if reason is None else LOST_WORKER_EXIT_CODE)


def write_report(run: Any, result: dict[str, Any], wall_seconds: float) -> None:
    """Writes and tells how the run went.

    Args:
      result: of `stage_report`.

    Raises:
      InputError: report.json cannot be written; all else has been done by then.
    """
    from trainer.reporting import report_file as reports

    config, folder = run.config, run.folder
    report = {
        "stage": config.stage,
        "world_size": run.distributor.num_shards,
        "data_note": run.store.note,
        **result,
        "wall_seconds": round(wall_seconds, 1),
        "config": dataclasses.asdict(config),
    }
    fault = ""
    try:
        reports.write(folder, report)
    except OSError as error:
        fault = f"{folder / 'report.json'} cannot be written: {error.strerror}"
    page = write_page(folder, run.log)
    if os.environ.get("WARMSTATE_PRINT_REPORT"):  # for who cannot read the run's folder
        run.log(f"report.json: {json.dumps(report)}")
    for tracker in run.trackers:
        tracker.end("finished", report)
    table = reports.comparison_table(report) if config.stage == "all" else None
    last = f"\n\nreport: {page}" if page else ""
    run.log(f"\n{table or json.dumps(result, indent=2)}{last}")
    if fault:
        raise InputError(f"{fault}: make room or make it writable, and run the same command again")


def write_page(folder: Path, log: Callable[[str], None]) -> str:
    """Writes report.html; returns its path, "" where it could not: it can be drawn later."""
    from trainer.report_page import html

    page = folder / "report.html"
    try:
        html.write([folder], page)
    except OSError as error:
        log(
            f"warning: {page} cannot be written: {error.strerror or error}; once it can, "
            f"`python -m trainer.report_page.html {folder}` draws it"
        )
        return ""
    return str(page)


def stage_report(run: Any) -> dict[str, Any]:
    """Runs the stage; returns its part of the report."""
    from trainer.stages import compare, evaluate, finetune, pretrain

    config, folder = run.config, run.folder
    if config.stage == "pretrain":
        return {"pretrain": pretrain.pretrain(run, folder)}
    if config.stage == "finetune":
        encoder = Path(config.encoder) if config.needs_encoder else None
        return {
            "finetune": finetune.finetune(
                run, folder, encoder, config.init_weights, config.initial_state
            )
        }
    if config.stage == "evaluate":
        split = config.evaluate_split
        return {split: evaluate.evaluate(run, Path(config.classifier), split, folder)}
    return compare.compare(run)


def open_store(config: Config, cluster: Cluster) -> TokenStore:
    """Returns the token store, made from --source if it is not there yet.

    Every process may come here at once: the `prepare` program locks the folder. It is a program
    of its own because it runs TensorFlow operations, after which this process could no longer
    make a multi-worker strategy.

    Raises:
      InputError: the store is damaged.
    """
    folder = config.store or str(Path(config.run_dir) / "store")
    if not config.store or not (Path(config.store) / "manifest.json").exists():
        command = [sys.executable, "-m", "data_pipelines.prepare", f"--out={folder}"]
        command += [f"--tokenizer={config.tokenizer}", f"--vocab_size={config.vocab_size}"]
        sources = {name: getattr(config, name) for name in ("source", "unlabelled", "labelled")}
        if not any(sources.values()):
            sources["source"] = "movie_reviews"
        given = {**sources, "data_dir": config.data_dir}
        command += [f"--{name}={value}" for name, value in given.items() if value]
        quiet = None if cluster.rank == 0 else subprocess.DEVNULL
        environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
        code = subprocess.run(command, stdout=quiet, env=environment).returncode
        if code:
            sys.exit(code)
    try:
        store = TokenStore(folder)
        if config.verify and cluster.rank == 0:
            store.verify()
    except OSError as error:
        raise InputError(
            f"--store={folder}: {error.filename} cannot be read: {error.strerror}"
        ) from None
    return store


def with_precision(config: Config, distributor: Any, log: Callable[[str], None]) -> Config:
    """Returns the configuration with a choice in place of --precision=auto; a collective."""
    if config.precision != "auto" or config.stage == "evaluate":  # which reads in float32
        return config
    from trainer.training import precision

    finetunes = config.stage == "finetune"
    batch_size = config.finetune_batch_size if finetunes else config.pretrain_batch_size
    rows = max(1, batch_size // distributor.num_shards)
    sizes = (rows, config.embedding_dim, config.units)
    resume = config.resume == "auto"
    folder = replay.folder_of_run(config) if config.step else Path(config.run_dir)
    chosen = precision.choose(distributor, folder, sizes, resume, log)
    return dataclasses.replace(config, precision=chosen)


def remember_config(config: Config, folder: Path) -> None:
    """Writes the configuration to the run's folder, for a resumed run, and the environment.

    Raises:
      InputError: the folder cannot be written.
    """
    from trainer.reporting import environment
    from trainer.safe_files import replace_text

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in (
            ("config.json", dataclasses.asdict(config)),
            ("environment.json", environment.describe()),
        ):
            replace_text(folder / name, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"--run_dir={folder} cannot be written: {error.strerror}: make room or make it writable"
        ) from None


def _print_faults(faults: str) -> None:
    for line in faults.splitlines():
        print(f"error: {line}", file=sys.stderr)


def _exit_at_once(code: int) -> NoReturn:
    """Ends this process without its orderly end, which would wait for the peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    flag_fields.define([Config])
    app.run(main, flags_parser=parse_flags)
