"""Launches trainers on this machine."""
