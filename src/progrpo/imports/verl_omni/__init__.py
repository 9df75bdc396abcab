"""The import of verl-omni's settings."""
