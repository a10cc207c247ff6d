# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""What the blocks of a ViL do with images, in numbers."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ..ops.gates import gate_statistics

# -- What is drawn ---------------------------------------------------------------------------------


@contextmanager
def recorded(backbone):
    """Collect what every block is given and returns.

    Yields:
        list[tuple]: Filled by a forward pass with input (B, N, D), grid and output (B, N, D) of
        each block.
    """
    records = []
    hooks = [
        block.register_forward_hook(lambda _, given, y: records.append((*given, y)))
        for block in backbone.layers
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def gates_of(block, x, grid):
    """Pre-activations of a block's gates.

    Args:
        block (ViLBlock): The block.
        x (Tensor): Its input, shape (B, N, D).
        grid (tuple[int, int]): Rows and columns of tokens.

    Returns:
        tuple[Tensor, Tensor]: Input and forget gate, shape (B, NH, N).
    """
    x_m, _ = block.proj_up(block.norm(x)).chunk(2, dim=-1)
    c = F.silu(block.conv(x_m, grid, block.reverse))
    by_head = block.q_proj(c), block.k_proj(c), block.v_proj(x_m)  # (B, NH, N, DH)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in by_head], dim=-1)  # (B, N, 3E)
    return block.igate(qkv).transpose(1, 2), block.fgate(qkv).transpose(1, 2)


def decay_weights(igate, fgate, reverse, token):
    r"""Weights :math:`D_{tj}` with which a token sees what others have written; 1 is the largest.

    Args:
        igate, fgate (Tensor): Pre-activations, shape (..., N).
        reverse (bool): Tokens are read from last to first.
        token (int): t.

    Returns:
        Tensor: Shape (..., N), 0 for tokens that have not been read yet.
    """
    stats = gate_statistics(igate, fgate, reverse)
    weights = torch.exp(stats.source - stats.running_max[..., token, None])
    unread = slice(0, token) if reverse else slice(token + 1, None)
    weights[..., unread] = 0
    return weights


def half_life(fgate):
    """After how many tokens half is forgotten, if the forget gate stays as it is."""
    return math.log(2) / -F.logsigmoid(fgate.double())


def receptive_field(backbone, images, blocks, at):
    """Gradient of the features of one token, absolute and averaged over images.

    Args:
        backbone (VisionLSTM): The backbone.
        images (list[Tensor]): Each of shape (1, C, H, W), all of one size.
        blocks (list[int]): After which blocks.
        at (tuple[float, float]): Place of the token, as parts of height and width.

    Returns:
        ndarray: Shape (blocks, H, W); the largest value of each map is 1.
    """
    total = 0
    for image in images:
        image = image.clone().requires_grad_()
        with recorded(backbone) as records, torch.enable_grad():
            backbone(image)
        token = token_at(records[0][1], at)
        maps = []
        for block in blocks:
            features = records[block][2][0, token].sum()
            (gradient,) = torch.autograd.grad(features, image, retain_graph=True)
            maps.append(gradient[0].abs().sum(0))
        total = total + torch.stack(maps)
    return (total / total.amax((1, 2), keepdim=True)).cpu().numpy()


def principal_colors(features):
    """The three strongest principal components as colors, the same for all images.

    Args:
        features (list[Tensor]): Tokens of each image, (N, D).

    Returns:
        list[ndarray]: (N, 3) in [0, 1].
    """
    tokens = torch.cat(features).double()
    tokens = tokens - tokens.mean(0)
    components = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    low, high = torch.quantile(components, torch.tensor([0.02, 0.98]).to(components), dim=0)
    colors = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return [color.cpu().numpy() for color in colors.split([len(x) for x in features])]


def token_at(grid, at):
    """Index of the token at a place given as parts of height and width."""
    row, column = (min(int(part * side), side - 1) for part, side in zip(at, grid))
    return row * grid[1] + column


def default_blocks(backbone, pairs):
    """A pair of blocks at the beginning, in the middle and at the end; or the blocks that are
    returned.
    """
    count = len(backbone.layers)
    if not pairs and len(backbone.out_indices) > 1:
        return list(backbone.out_indices)
    starts = sorted({0, (count // 4) * 2, count - 2 - count % 2}) if count > 1 else [0]
    both = [block for start in starts for block in (start, start + 1) if 0 <= block < count]
    return sorted(set(both)) if pairs else sorted({both[-1], *both[1::2]})
