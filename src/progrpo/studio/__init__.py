"""The studio: a local page to try a run's model, and to see what a plan does to a group."""
