"""Losses: softmax, adversarial perturbations, label gain, bags of words."""
