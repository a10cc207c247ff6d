# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Load pre-trained weights into a backbone."""

from collections.abc import Mapping

from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .compare import describe_misfit, summarize
from .keys import part_of, weights_of


def load_pretrained(backbone: nn.Module, filename: str, prefix: str | None = None) -> None:
    """Load a backbone from an mmvil or official checkpoint, and log which tensors were loaded.

    Args:
        backbone (VisionLSTM): The backbone.
        filename (str): File, URL or ``mmvil://NAME``.
        prefix (str, optional): Prefix of the backbone's weights. Default: 'backbone.' if any name
            has it, else none.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    logger = MMLogger.get_current_instance()
    source = weights_of(CheckpointLoader.load_checkpoint(filename, 'cpu', logger))
    if prefix is None and any(name.startswith('backbone.') for name in source):
        prefix = 'backbone.'
    prefix = prefix.removeprefix('module.').rstrip('.') + '.' if prefix else ''
    state = backbone.adapt_pretrained(part_of(source, prefix))
    check_pretrained(backbone, state, filename, prefix)
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    unused = unexpected + [name for name in source if not name.startswith(prefix)]
    total = len(backbone.state_dict())
    logger.info(
        f'Loaded {total - len(missing)} of {total} backbone tensors from {filename}. '
        f'Left at initialization: {summarize(missing)}. '
        f'Not used from the checkpoint: {summarize(unused)}.'
    )


def has_blocks(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict, without prefix, has ViL blocks."""
    return any(name.startswith('layers.') for name in state_dict)


def check_pretrained(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], source: str, prefix: str = ''
) -> None:
    """Raise a ValueError unless a state dict, without prefix, has the embeddings and all blocks of
    a backbone in the right shapes. The message names the source, and the prefix in it.
    """
    if has_blocks(state_dict):
        own, trunk = backbone.state_dict(), ('patch_embed.', 'pos_embed', 'layers.')
        optional = [name for name in own if not name.startswith(trunk)]
        mismatch = describe_misfit(state_dict, own, optional)
    else:
        mismatch = f'it has no ViL blocks, but {summarize([*state_dict])}'
    if mismatch:
        source += f', {prefix}*,' if prefix else ''
        raise ValueError(
            f'{source} does not fit this VisionLSTM (embed_dims={backbone.embed_dims}, '
            f'version={backbone.version}): {mismatch}. Choose the arch and version of the '
            'checkpoint, or another checkpoint.'
        )
