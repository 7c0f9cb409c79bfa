"""The stages of a run, from pretraining to evaluation."""
