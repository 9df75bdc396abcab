"""The import of other frameworks' settings as a configuration of ours, with the outcome of each setting."""
