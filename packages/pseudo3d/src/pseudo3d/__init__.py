"""Semi-supervised image-based 3D object detection with pseudo-labels. No working part yet."""

__version__ = "0.1.0"
