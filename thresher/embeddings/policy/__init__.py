"""F-Quantization: which precision each row deserves."""
