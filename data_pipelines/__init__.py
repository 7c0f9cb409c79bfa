"""Text -> tokens on disk -> batches. Imports nothing of `trainer` or `launch`.

The rooms by floor. A room imports only from floors below its own (tests/test_architecture.py):

    5  prepare
    4  batches, rows
    3  store, sources, word_vectors
    2  files, tokenizers
    1  errors, flag_fields, quiet_tensorflow, reserved_ids
"""
