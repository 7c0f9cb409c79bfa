"""Launches trainers on Kubernetes."""
