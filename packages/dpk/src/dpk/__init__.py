"""Knowledge distillation with dynamic prior knowledge. No working part yet."""

__version__ = "0.1.0"
