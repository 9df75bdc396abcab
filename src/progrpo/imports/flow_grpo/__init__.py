"""The import of flow_grpo's settings."""
