"""WHAT IS CARRIED AWAY: the names that other tools have for a model's layers, and the export of a run."""
