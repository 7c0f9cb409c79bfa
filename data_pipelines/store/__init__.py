"""Token stores: tokenized documents on disk, written once and memory-mapped."""
