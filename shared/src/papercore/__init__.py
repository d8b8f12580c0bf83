"""What at least two of the papers' packages share: command lines, runs, training, reports, quantisers, samplers."""

__version__ = "0.1.0"
