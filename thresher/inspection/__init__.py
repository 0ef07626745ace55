"""WHAT a trained model learned: analysis of tables, fields and runs. Nothing lives here yet."""
