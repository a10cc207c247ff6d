# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Time ViL with the cell in the formulation that the authors published: N x N matrices of gates,
scores and weights, and flipped tokens for the other direction.

python tools/.dev_scripts/authors_formulation.py
"""

from unittest import mock

import timm
import torch
import torch.nn.functional as F

import mmvil
from mmvil.apis import measure


def main():
    torch.set_num_threads(2)
    builders = dict(
        DeiT=lambda size: timm.create_model('deit_tiny_patch16_224', img_size=size, num_classes=0),
        mmvil=lambda size: mmvil.VisionLSTM('tiny', img_size=size),
        authors=AuthorsViL,
    )
    quiet = dict(rounds=5, progress=lambda text: None)
    for size, batch in ((224, 8), (512, 2)):
        image = torch.rand(batch, 3, size, size)
        for record in measure.compare(builders, image, ('forward',), **quiet):
            print(f'{size} x {size}: {record["model"]:6} {record["time_ratio"]:.2f}', flush=True)


class AuthorsViL(mmvil.VisionLSTM):
    """ViL-T that calls :func:`authors_mlstm`."""

    def __init__(self, size):
        super().__init__('tiny', img_size=size, lean=False)

    def forward(self, x):
        with mock.patch('mmvil.layers.vil_block.mlstm', authors_mlstm):
            return super().forward(x)


def authors_mlstm(q, k, v, *, igate, fgate, reverse, **_):
    """The equations of :func:`mmvil.ops.mlstm`, one N x N matrix after the other."""
    inputs = (q, k, v, igate, fgate)
    q, k, v, igate, fgate = (x.flip(2) if reverse else x for x in inputs)
    tokens, head_width = q.shape[2:]
    cumulative = F.logsigmoid(fgate).cumsum(-1)  # F_t, (B, NH, N)
    forget = cumulative.unsqueeze(-1).repeat(1, 1, 1, tokens)  # F_t - F_j, below
    forget = forget - forget.transpose(-1, -2)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    logarithms = torch.where(causal, forget, -torch.inf) + igate.unsqueeze(-2)  # a_tj
    stabilizer = logarithms.amax(-1, keepdim=True)  # m_t
    weights = torch.exp(logarithms - stabilizer)
    scores = (q @ (k / head_width**0.5).transpose(-1, -2)) * weights
    normalizer = torch.maximum(scores.sum(-1, keepdim=True).abs(), torch.exp(-stabilizer))
    h = (scores / (normalizer + 1e-6)) @ v
    return h.flip(2) if reverse else h


if __name__ == '__main__':
    main()
