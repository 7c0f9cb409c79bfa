"""Global batches: which documents, in which order, as arrays."""
