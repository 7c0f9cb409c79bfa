"""Sources of text: `open_source` opens the one that a spec names."""

from data_pipelines.sources.registry import SPECS, open_source
from data_pipelines.sources.source import SPLITS, BadExample, Example, Source, SourceOptions

__all__ = ["SPECS", "SPLITS", "BadExample", "Example", "Source", "SourceOptions", "open_source"]
