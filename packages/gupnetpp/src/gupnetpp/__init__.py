"""Monocular 3D object detection with geometry uncertainty propagation. No working part yet."""

__version__ = "0.1.0"
