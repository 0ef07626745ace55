"""How long a schedule takes, how much memory it needs, what that looks like, and which settings are best."""
