"""Reward models that are learned from pairs: backbones, heads, their training and their folders."""
