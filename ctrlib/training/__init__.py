"""Engines, loops and whole experiments around a model."""
