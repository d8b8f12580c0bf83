"""Recipes, exact evaluation and error diagnosis for image-based 3D object detection. No working part yet."""

__version__ = "0.1.0"
