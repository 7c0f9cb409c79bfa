"""Text -> tokens on disk -> batches. Imports nothing of `trainer` or `launch`.

The rooms by floor. A room imports only from floors below its own (tests/test_architecture.py):

    5  prepare
    4  batches
    3  store
    2  object_store, sources, tokenizers, word_vectors
    1  durable, files, flag_fields, permutation, printable, quiet_tensorflow
    0  errors, reserved_ids
"""
