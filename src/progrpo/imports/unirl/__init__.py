"""The import of UniRL's settings."""
