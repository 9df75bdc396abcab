"""Families that are learnt from a pipeline's own call, for pipelines that have none here."""
