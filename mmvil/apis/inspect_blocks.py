# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Features, gates, memory decay and receptive fields of ViL blocks."""

import math

import torch
import torch.nn.functional as F

from ..backbones import VisionLSTM
from ..ops.gates import gate_statistics


def find_backbone(model):
    """Return the first VisionLSTM inside a model. Raises ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, VisionLSTM):
            return module
    raise ValueError('the model has no VisionLSTM')


def trained_size(backbone):
    """Image size (height, width) of a VisionLSTM's position embedding."""
    return tuple(side * backbone.patch_size for side in backbone.pos_embed.shape[1:3])


def default_blocks(backbone, pairs):
    """Choose representative blocks of a VisionLSTM: with ``pairs``, both reading directions at the
    beginning, in the middle and at the end; otherwise the blocks whose features are returned, or
    blocks spread over the depth.
    """
    count = len(backbone.layers)
    if not pairs and len(backbone.out_indices) > 1:
        return list(backbone.out_indices)
    starts = {0, count // 4 * 2, max(count - 2 - count % 2, 0)}
    blocks = sorted({block for i in starts for block in (i, i + 1) if block < count})
    return blocks if pairs else sorted({blocks[-1], *blocks[1::2]})


def token_at(grid, at):
    """Index of the token at (y, x), given as fractions of height and width."""
    row, column = (min(int(part * side), side - 1) for part, side in zip(at, grid))
    return row * grid[1] + column


def block_features(backbone, images):
    """Compute the tokens (B, N, D) after each block, from images (B, C, H, W)."""
    x, grid = backbone.embed(images)
    every = range(len(backbone.layers))
    return backbone.layers.forward(x, grid, every)  # without the option compile


def block_gates(backbone, images):
    """Compute the pre-activations (B, NH, N) of input and forget gate of each block, from images
    (B, C, H, W).
    """
    x, grid = backbone.embed(images)
    gates = []
    for block in backbone.layers:
        gates.append(block.gates(x, grid))
        x = block(x, grid)
    return gates


def decay_weights(igate, fgate, reverse, token):
    r"""Compute the weights :math:`D_{tj}` of the tokens j in the output of token t.

    Args:
        igate, fgate (Tensor): Gate pre-activations, shape (..., N).
        reverse (bool): Whether tokens are read from last to first.
        token (int): t.

    Returns:
        Tensor: Shape (..., N), normalized to a maximum of 1; 0 for tokens not read yet.
    """
    stats = gate_statistics(igate, fgate, reverse)
    weights = torch.exp(stats.log_weight - stats.running_max[..., token, None])
    unread = slice(0, token) if reverse else slice(token + 1, None)
    weights[..., unread] = 0
    return weights


def half_life(fgate):
    """Number of tokens after which half is forgotten at a constant forget gate (elementwise)."""
    return math.log(2) / -F.logsigmoid(fgate.double())


def receptive_field(backbone, images, blocks, at):
    """Compute the effective receptive field of the token at a position (Luo et al., 2016; see
    :func:`token_at`): the absolute gradient of its features after some blocks with respect to the
    pixels of images of one size, each (1, C, H, W), summed over channels and averaged over images.

    Returns:
        Tensor: Shape (blocks, H, W), each map normalized to a maximum of 1.
    """
    total = 0
    for image in images:
        token = token_at(backbone.embed(image)[1], at)
        image = image.clone().requires_grad_()
        features = block_features(backbone, image)
        gradients = [
            torch.autograd.grad(features[block][0, token].sum(), image, retain_graph=True)[0][0]
            for block in blocks
        ]
        total = total + torch.stack(gradients).abs().sum(1)
    return total / total.amax((1, 2), keepdim=True)


def principal_colors(features):
    """Project the tokens (N, D) of each image onto three principal components, shared by all
    images, as RGB colors (N, 3) in [0, 1], with 2% clipped at both ends.
    """
    tokens = torch.cat(features).double()
    tokens = tokens - tokens.mean(0)
    components = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]).to(components), dim=0)
    colors = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colors.split([len(x) for x in features])
