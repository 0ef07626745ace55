"""Training of click models beside FuxiCTR: its models, ours, torch's sparse tables, and data all three read."""
