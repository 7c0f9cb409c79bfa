"""Workers and their collectives, preemption, lost peers, and variables as bytes."""
