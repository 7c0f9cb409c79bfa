"""Turns a source's text into a token store: `python -m data_pipelines.prepare`."""

from data_pipelines.prepare.build import build_store, ensure_store
from data_pipelines.prepare.config import PrepareConfig

__all__ = ["PrepareConfig", "build_store", "ensure_store"]
