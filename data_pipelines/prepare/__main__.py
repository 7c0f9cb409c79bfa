"""Runs `prepare` as a program."""

import os

from absl import app

from data_pipelines.prepare import command

if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # text needs no GPU
    command.define_flags()
    app.run(command.main, flags_parser=command.parse_flags)
