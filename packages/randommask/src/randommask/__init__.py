"""DNA language-model pretraining with growing random masks, and its diagnostics. No working part yet."""

__version__ = "0.1.0"
