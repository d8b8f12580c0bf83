"""Benchmark of RNA language models: 13 tasks, tokenisers, position encodings and a small baseline.

No working part yet.
"""

__version__ = "0.1.0"
