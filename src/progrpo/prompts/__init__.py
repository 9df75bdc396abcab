"""WHAT IS ASKED FOR: prompts from files, datasets and Python, their pictures, and the order that iterations get them in."""
