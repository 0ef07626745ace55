"""Side-by-side measurements: one script per claim; ``results/`` holds what they recorded."""
