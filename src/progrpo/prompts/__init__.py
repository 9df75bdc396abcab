"""Prompts from files, datasets and Python, their pictures, and the order in which iterations get them."""
