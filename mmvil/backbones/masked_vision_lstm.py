# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Vision-LSTM for masked image modeling with SimMIM.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu: SimMIM: A Simple Framework for Masked Image Modeling, CVPR
2022 (arXiv 2111.09886).
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from .vision_lstm import VisionLSTM


@MODELS.register_module()
class MaskedVisionLSTM(VisionLSTM):
    """Vision-LSTM with a learned token in place of each masked patch, for mmpretrain's ``SimMIM``.

    Arguments and parameters are those of :class:`VisionLSTM`, plus the parameter ``mask_token`` (1,
    1, D), which is used in pre-training only.

    Raises:
        ValueError: As :class:`VisionLSTM`, and if patches overlap.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.stride != self.patch_size:
            raise ValueError(
                f'With stride={self.stride} below patch_size={self.patch_size} patches overlap, '
                'and visible ones would contain masked pixels. Leave stride out.'
            )
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dims))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Extract features of all patches of masked images, see :meth:`VisionLSTM.forward`.

        Args:
            x (Tensor): Images, shape (B, C, H, W).
            mask (Tensor, optional): Nonzero where a patch is masked, shape (B, H / patch_size,
                W / patch_size). Default: None, no patch.

        Raises:
            ValueError: If the mask does not have one entry per patch, and as
                :meth:`VisionLSTM.embed`.
        """
        if mask is None:
            return super().forward(x)
        tokens, grid = self.patch_embed(x)
        batch, _, height, width = x.shape
        patch = self.patch_size
        if tuple(mask.shape) != (batch, height / patch, width / patch):
            raise ValueError(
                f'Expected a mask with one entry per patch of {patch} x {patch} pixels for '
                f'{batch} images of {height} x {width}, but got the shape {tuple(mask.shape)}. '
                'Images must be a multiple of the patch size, and model_patch_size and input_size '
                'of the mask generator must equal the sizes of patches and images.'
            )
        masked = mask.flatten(1).unsqueeze(2).bool()
        tokens = torch.where(masked, self.mask_token, tokens)
        return self.encode(self.add_positions(tokens, grid), grid, (height, width))

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """See :meth:`VisionLSTM.get_layer_depth`; the mask token is one of the embeddings."""
        if param_name == f'{prefix}mask_token':
            param_name = f'{prefix}pos_embed'
        return super().get_layer_depth(param_name, prefix)

    def reset_parameters(self) -> None:
        """Initialize all parameters like the constructor."""
        super().reset_parameters()
        nn.init.trunc_normal_(self.mask_token, std=0.02)
