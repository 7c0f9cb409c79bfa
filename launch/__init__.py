"""Starts trainer processes somewhere; knows flags and environments, never tensors.

The rooms by floor. A room imports only from floors below its own (tests/test_architecture.py):

    3  main
    2  kubernetes, local, slurm
    1  log_files, platform
"""
