"""What a run writes and prints while it runs."""
