"""Lookup and update of rows: one contract, and the backends that fulfil it."""
