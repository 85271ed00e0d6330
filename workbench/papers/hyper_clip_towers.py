"""A small pretrained image encoder as an open_clip image tower, a channel affine after each convolution."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from workbench.hypernetworks import ChannelAffine
from workbench.image_encoders import ImageEncoder, open_image_encoder


class PretrainedTower(nn.Module):
    """A frozen network whose channel scales and shifts, and whose projection, are trained or generated."""

    def __init__(self, encoder: ImageEncoder, embed_dim: int) -> None:
        """Put affines where the network's own norms were folded away."""
        super().__init__()
        self.encoder, self.checkpointing = encoder.requires_grad_(False), False
        encoder.head = None
        for path, channels in encoder.affine_places().items():
            parent, _, last = path.rpartition(".")
            if last == "affine":
                setattr(encoder.get_submodule(parent), last, ChannelAffine(channels))
            else:  # a BatchNorm, which is conditioned as it is
                encoder.get_submodule(path).requires_grad_(True)
        self.projection = nn.Linear(encoder.width, embed_dim)

    def set_grad_checkpointing(self, enable: bool = True, **_: object) -> None:
        """Compute activations again in the backward pass."""
        self.checkpointing = enable

    def forward(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        """Embed images in -1 to 1, open_clip's range here; the encoder brings its own preprocessing."""
        pixels = (images + 1) * 127.5
        if self.checkpointing and torch.is_grad_enabled():
            return self.projection(checkpoint(self.encoder, pixels, use_reentrant=False))
        return self.projection(self.encoder(pixels))


def pretrained_tower(name: str, embed_dim: int) -> PretrainedTower:
    """Open a prepared encoder as a tower.

    Raises:
        DataError: no encoder of that name.
        ManifestError: its weights are not on this machine.
    """
    return PretrainedTower(open_image_encoder(name), embed_dim)
