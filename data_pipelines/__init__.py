"""Text -> tokens on disk -> batches. Imports nothing of `trainer` or `launch`."""
