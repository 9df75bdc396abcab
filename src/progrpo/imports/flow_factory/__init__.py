"""The import of Flow-Factory's settings."""
