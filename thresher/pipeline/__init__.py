"""WHEN slices of a sequence flow through pipeline stages. Nothing lives here yet."""
