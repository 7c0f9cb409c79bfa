"""Runs `prepare` as a program."""

import os

from absl import app

from data_pipelines import flag_fields
from data_pipelines.prepare import command

if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # text needs no GPU
    flag_fields.define([command.Options])
    app.run(command.main, flags_parser=command.parse_flags)
