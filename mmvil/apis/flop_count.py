# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Parameters and multiply-adds of an OpenMMLab model, by part."""

import logging

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..layers import HeadwiseLinear
from ..ops.flops import flop_formulas
from ..ops.projections import dense_block_width


def count_parameters(model):
    """Count the parameters of each part (backbone, neck, head, ...) and in total."""
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in _parts(model)}
    return {**parts, 'total': sum(p.numel() for p in model.parameters())}


def count_multiply_adds(model, shape, needed=False):
    """Count the multiply-adds of one forward pass, for each part and in total.

    Args:
        model (nn.Module): An OpenMMLab model on the meta device. Parts that inference skips, such
            as auxiliary heads, count 0.
        shape (tuple[int, ...]): Shape of the input, (B, C, H, W).
        needed (bool): Count what the equations need instead of what is executed. Default: False.
    """
    parts = _parts(model)
    counts = {name: 0 for name, _ in parts}
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas(visible_only=needed))
    zeros = 0

    def total():
        return counter.get_total_flops() // 2 - zeros

    def counted(name, forward):
        def call(*args, **kwargs):
            before = total()
            result = forward(*args, **kwargs)
            counts[name] += total() - before
            return result

        return call

    def leave_out_zeros(projection, args, _):
        """Count the zeros between diagonal blocks, which are executed joined into wider ones."""
        nonlocal zeros
        x, size = args[0], projection.weight.shape[-1]
        executed = dense_block_width(size, x.shape[-1] // projection.num_heads)
        zeros += x.numel() * (executed - size)

    hooks = [
        module.register_forward_hook(leave_out_zeros)
        for module in model.modules()
        if needed and isinstance(module, HeadwiseLinear)
    ]
    for name, part in parts:  # not hooks: segmentors call decode_head.forward
        part.forward = counted(name, part.forward)
    log = logging.getLogger('mmvil')
    log.disabled = True  # blocks would warn of the hooks of this count
    try:
        with torch.no_grad(), counter:
            model(torch.empty(shape, device='meta'), mode='tensor')
    finally:
        log.disabled = False
        for _, part in parts:
            del part.forward
        for hook in hooks:
            hook.remove()
    return {**counts, 'total': total()}


def _parts(model):
    """Names and modules of the model's parts that have parameters."""
    return [(name, part) for name, part in model.named_children() if list(part.parameters())]
