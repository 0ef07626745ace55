"""How rows are stored: formats, memory, and the two kinds of table."""
