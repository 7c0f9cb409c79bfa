"""Launches trainers under SLURM."""
