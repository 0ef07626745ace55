"""Recipes: one module per source of data, each turning files as users have them into raw tables of a schema."""
