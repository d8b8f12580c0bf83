"""The 2015 Inception graph of the FID, from torch-fidelity, with weights from a file that is already on this machine.

Pooled features [n, 2048]; the first 7 channels of the first 1x1 branch of the sixth mixed block [n, 7 x 17 x 17], in
the order height, width, channel, for sFID; probabilities of 1008 classes from the last layer without its bias.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from papercore.errors import InputError
from torch import Tensor, nn


class Inception:
    """uint8 images [n, h, w, 3] -> the fields of `qdit.evaluate.Features`.

    Args:
        weights: torch-fidelity's weight file (`pt_inception-2015-12-05-6726825d.pth`), a state dict.

    Raises:
        InputError: torch-fidelity is not installed, or the file is missing or something else.
    """

    def __init__(self, weights: Path | None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(
                "--features inception", found="no torch-fidelity", expected="pip install qdit[inception]"
            ) from error
        if weights is None or not Path(weights).is_file():
            raise InputError(
                "--inception-weights",
                found=str(weights),
                expected="torch-fidelity's weight file, already on this machine",
            )
        try:
            # torch-fidelity unpickles without restriction: what is more than tensors is refused before it does
            torch.load(weights, map_location="cpu", weights_only=True)
            self.network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:
            raise InputError("Inception weights", where=weights, found=str(error), expected="its state dict") from error
        self.network.eval()
        self.branch: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)  # pyright: ignore

    def _keep(self, _: nn.Module, __: object, output: Tensor) -> None:
        self.branch = output

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 32) -> Mapping[str, Tensor]:
        if images.shape[-1] != 3:
            raise InputError("image size", found=tuple(images.shape[1:]), expected="three channels for Inception")
        pooled, spatial, probabilities = [], [], []
        for part in images.permute(0, 3, 1, 2).split(batch):
            features, logits = self.network(part)
            assert self.branch is not None
            pooled.append(features)
            spatial.append(self.branch[:, :7].permute(0, 2, 3, 1).flatten(1))
            probabilities.append(logits.softmax(1))
        return {
            "features": torch.cat(pooled),
            "spatial": torch.cat(spatial),
            "probabilities": torch.cat(probabilities),
        }
