"""Attention of one slice over itself and the slices before it, whose keys and values are kept."""
