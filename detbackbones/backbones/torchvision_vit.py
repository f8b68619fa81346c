"""torchvision's VisionTransformer as a feature extractor for images of any size."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VisionTransformer


class VisionTransformerFeatures(nn.Module):
    """The last tokens of a torchvision ViT as a map.

    Position embeddings are resampled to the grid of the image, as torchvision's
    ``interpolate_embeddings`` does it for a checkpoint. Parameters keep their names.
    """

    def __init__(self, model: VisionTransformer):
        """
        Args:
            model: the classification model; it shares its parameters.
        """
        super().__init__()
        self.conv_proj = model.conv_proj
        self.class_token = model.class_token
        self.encoder = model.encoder
        self.patch_size = model.patch_size
        self.grid = model.image_size // model.patch_size

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            x: images (N, 3, H, W); H and W are multiples of the patch size.

        Returns:
            one map (N, C, H / patch size, W / patch size).
        """
        patches = self.conv_proj(x)
        grid = patches.shape[2:]
        tokens = torch.cat(
            [self.class_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
        )
        tokens = self.encoder.dropout(tokens + self._positions(grid))
        tokens = self.encoder.ln(self.encoder.layers(tokens))
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, grid)]

    def _positions(self, grid: torch.Size) -> torch.Tensor:
        positions = self.encoder.pos_embedding
        if tuple(grid) == (self.grid, self.grid):
            return positions
        of_map = positions[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        of_map = F.interpolate(of_map, grid, mode="bicubic", align_corners=True)
        return torch.cat([positions[:, :1], of_map.flatten(2).transpose(1, 2)], dim=1)
