"""Starts trainer processes somewhere; knows flags and environments, never tensors."""
