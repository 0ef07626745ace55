"""What is said of a figure measured with several seeds."""

import statistics


def summary(values: list[float]) -> dict[str, float]:
    """Mean, min, max, and their distance, the spread."""
    low, high = min(values), max(values)
    return {"mean": statistics.mean(values), "min": low, "max": high, "spread": high - low}
