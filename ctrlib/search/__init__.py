"""Smaller models: what to keep of a trained one, and how small a new one may be."""
