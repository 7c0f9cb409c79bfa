"""The training loop, its step, and what they need."""
