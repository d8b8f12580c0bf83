"""Vision transformers that choose channels and tokens per input under a compute budget. No working part yet."""

__version__ = "0.1.0"
