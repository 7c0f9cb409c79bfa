r"""warmstate: pretrain a recurrent encoder, hand over its weights and states, fine-tune an LSTM.

  python -m trainer.main --stage=pretrain --run_dir=runs/a --store=runs/store
  python -m trainer.main --stage=finetune --run_dir=runs/b --store=runs/store \
      --encoder=runs/a/encoder --initial_state=learned
  python -m trainer.main --stage=evaluate --run_dir=runs/c --store=runs/store \
      --classifier=runs/b/classifier
  python -m trainer.main --stage=replay --run_dir=runs/a --step=120

On several workers: python -m launch.main --platform=local --workers=2 -- FLAGS
"""

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app

from data_pipelines import flag_fields
from data_pipelines.errors import (
    LOST_WORKER_EXIT_CODE,
    PREEMPTED_EXIT_CODE,
    USAGE_EXIT_CODE,
    InputError,
    TransientError,
)
from data_pipelines.printable import printable
from data_pipelines.quiet_tensorflow import import_quietly
from trainer import config as configuration
from trainer import preflight
from trainer.config import Config
from trainer.distribution import cluster as clusters
from trainer.distribution.cluster import Cluster
from trainer.distribution.preemption import Preempted
from trainer.mirror import BehindError


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses `argv`. Prints the help, or all faults, and exits if there are any."""
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
        sys.exit(USAGE_EXIT_CODE)
    return [argv[0], *words]


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags name.

    The exit code is 2 for bad input, 75 for a lost worker or a --mirror that is behind, 143 after
    TERM, 1 after another error. Ctrl-C ends the process by its signal.
    """
    config = configuration.from_flags()
    cluster = clusters.resolve(os.environ)
    code = exit_code_of(config, cluster, argv[1:])
    if code == PREEMPTED_EXIT_CODE and cluster.size > 1:
        gc.collect()  # drops the input pipeline while its threads can still run Python
        sys.exit(code)  # with the peers, which would miss a worker that ends at once
    if code:
        _exit_at_once(code)


def exit_code_of(config: Config, cluster: Cluster, texts: Sequence[str]) -> int:
    """Runs a stage; prints why it ended early, and returns the exit code."""
    try:
        if config.stage in configuration.USING_STAGES:
            use_classifier(config, texts)
        else:
            import_quietly(
                is_program=True
            )  # here, so that flags are checked and help is printed without it
            from trainer.stages.run_stage import run_stage

            run_stage(config, cluster)
    except InputError as error:
        _print_faults(str(error))
        is_transient = isinstance(error, TransientError)
        return LOST_WORKER_EXIT_CODE if is_transient else USAGE_EXIT_CODE
    except BehindError as error:
        _print_faults(str(error))
        return LOST_WORKER_EXIT_CODE
    except Preempted as stop:
        print(stop, flush=True)
        return PREEMPTED_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except Exception as error:
        return _code_after(error, cluster)
    return 0


def use_classifier(config: Config, texts: Sequence[str]) -> None:
    """Runs a stage that needs a trained classifier and no data, on the CPU.

    Raises:
        InputError: The classifier cannot be used, or cannot be used on these texts.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # One text gains nothing from a GPU, and an exported model must run without one.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    import_quietly(is_program=True)
    from trainer import native
    from trainer.inference import export, predict

    if config.stage != "export":
        native.use_in_inference()
    try:
        if config.stage == "serve":
            from trainer.inference import serve

            serve.serve(config)
        elif config.stage == "export":
            if config.hub_dir:
                from trainer.inference.hub import write_hub_folder

                folders = Path(config.classifier), Path(config.hub_dir)
                print(write_hub_folder(*folders, config.hub_licence))
            if config.output:
                print(export.export(Path(config.classifier), Path(config.output)))
        elif config.reconstruct:
            predict.reconstruct(config, texts)
        else:
            predict.predict(config, texts)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code_after(error: Exception, cluster: Cluster) -> int:
    """Prints an error; returns 75 if a lost peer caused it, else 1."""
    from trainer.distribution.failures import lost_peer

    reason = lost_peer(error)
    if reason is None:
        traceback.print_exception(error)
        return 1
    print(f"worker {cluster.rank} lost a peer: {reason}")
    return LOST_WORKER_EXIT_CODE


def _print_faults(faults: str) -> None:
    for line in printable(faults).splitlines():
        print(f"error: {line}", file=sys.stderr)


def _exit_at_once(code: int) -> NoReturn:
    """Ends this process without cleaning up.

    That would wait for the peers; and for the threads of the input pipeline, which can no longer
    run Python by then: forever, if they were reading.
    """
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    flag_fields.define([Config])
    app.run(main, flags_parser=parse_flags)
