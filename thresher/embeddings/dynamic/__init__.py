"""Tables keyed by raw ids: admission, eviction, growth."""
