"""How the program ends while its input pipeline reads."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

# Forks one process per ending, after importing TensorFlow and before running any operation. Unlike
# the processes of tests/forked.py, these finalise the interpreter.
PROGRAM = """
import json, os, sys, threading, time
import tensorflow as tf
from data_pipelines import flag_fields
from data_pipelines.errors import InputError
from trainer import main
from trainer.config import Config
from trainer.distribution import cluster
from trainer.distribution.preemption import Preempted
from trainer.stages import run_stage

def ends_by(error):
    def run(config, cluster):
        def read(number):
            for _ in range(100 if number else 0):  # the lock is taken again and again
                time.sleep(0.01)
            return number
        numbers = tf.data.Dataset.range(9)
        reads = numbers.map(lambda n: tf.numpy_function(read, [n], tf.int64), num_parallel_calls=2)
        batches = iter(reads.prefetch(2))
        next(batches)
        raise error()
    run_stage.run_stage = run
    flag_fields.define([Config])
    from absl import flags
    flags.FLAGS(["program"])
    main.main(["program"])

endings = {
    "input": (lambda: InputError("no such flag"), 1),
    "mistake": (lambda: RuntimeError("a mistake"), 1),
    "interrupted": (KeyboardInterrupt, 1),
    "preempted": (lambda: Preempted("stopped by TERM"), 1),
    "preempted with peers": (lambda: Preempted("stopped by TERM"), 2),
}
children = {}
for name, (error, size) in endings.items():
    pid = os.fork()
    if not pid:
        cluster.resolve = lambda environ, size=size: cluster.Cluster(0, size)
        sys.exit(ends_by(error))
    children[pid] = name
threading.Timer(60, lambda: [os.kill(pid, 9) for pid in children]).start()
codes = {}
while children:
    pid, status = os.wait()
    codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
print(json.dumps(codes), flush=True)
os._exit(0)
"""


def test_it_ends_though_a_batch_is_being_read() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "input": 2,
        "mistake": 1,
        "interrupted": -2,
        "preempted": 143,
        "preempted with peers": 143,
    }
    assert "error: no such flag\n" in done.stderr
    assert "RuntimeError: a mistake\n" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "interrupted\n" in done.stderr
    assert done.stdout.count("stopped by TERM\n") == 2
