"""One training for all mixed-precision configurations of a network, then search without retraining.

No working part yet.
"""

__version__ = "0.1.0"
