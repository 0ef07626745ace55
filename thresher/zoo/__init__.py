"""Published models, built from ``zoo/blocks``."""
