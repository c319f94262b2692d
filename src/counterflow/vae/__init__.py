"""Variational autoencoders: likelihoods, networks, the model."""
