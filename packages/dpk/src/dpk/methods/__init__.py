"""The methods that DPK is compared with, each as its authors define it."""

from dpk.methods.features import AttentionTransfer, FitNet
from dpk.methods.logits import DKD, KD
from dpk.methods.review import ReviewKD

__all__ = ["DKD", "KD", "AttentionTransfer", "FitNet", "ReviewKD"]
