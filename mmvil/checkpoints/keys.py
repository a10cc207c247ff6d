# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Convert official Vision-LSTM state dicts, and infer the architecture from a state dict."""

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

# Training checkpoints and standalone models, whose version 2 counts pairs of blocks.
_OFFICIAL_BLOCK = re.compile(
    r'(?:xlstm\.)?blocks\.(?P<number>\d+)\.(?:rowwise_from_(?P<corner>top_left|bot_right)\.)?'
    r'(?:xlstm\.|layer\.)?(?P<rest>.+)'
)
# Official names of the modules in a block, and ours.
_BLOCK_NAMES = {
    **{name: name for name in ('norm', 'proj_up', 'q_proj', 'k_proj', 'v_proj', 'proj_down')},
    **dict.fromkeys(('conv', 'conv.conv', 'conv1d', 'conv1d.conv'), 'conv'),
    'xlstm_norm': 'norm',
    'mlstm_cell.igate': 'igate',
    'mlstm_cell.fgate': 'fgate',
    'mlstm_cell.outnorm': 'out_norm',
}
_BLOCK = re.compile(r'backbone\.layers\.(\d+)\.(.+)')
_STACK_NORM_WEIGHT = re.compile(r'backbone\.(layers\.\d+\.(out_)?norm|norm)\.weight$')


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has one of the official layouts, complete or not."""
    return any('.mlstm_cell.' in key and _OFFICIAL_BLOCK.match(key) for key in state_dict)


def weights_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Extract the weights of a checkpoint, under the names of a plain mmvil model.

    Args:
        checkpoint (Mapping): A checkpoint with ``state_dict``, or a state dict, of mmvil or
            official, see :func:`vil_to_mmvil`.

    Returns:
        dict[str, Tensor]: A new dict, without the prefix ``module.`` that DDP adds.

    Raises:
        ValueError: If it is neither.
    """
    is_dict = isinstance(checkpoint, Mapping)
    state = checkpoint.get('state_dict', checkpoint) if is_dict else checkpoint
    if not isinstance(state, Mapping):
        raise ValueError(
            "A checkpoint must be a state dict, or a dict with one as 'state_dict', "
            f'not of type {type(state).__name__}.'
        )
    state = {name.removeprefix('module.'): value for name, value in state.items()}
    return vil_to_mmvil(state) if is_official(state) else state


def part_of(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Extract the tensors whose names start with a prefix, under names without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }


def vil_to_mmvil(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an official state dict to the layout of mmpretrain's ``ImageClassifier``
    (``backbone.*``, ``head.fc.*``).

    Both official layouts are supported, in versions 1 and 2: that of the training checkpoints
    (``xlstm.blocks.*``) and that of the standalone models (``blocks.*``, ``norm``,
    ``legacy_norm``). The norms inside the blocks store their weight minus 1; the 1 is added in
    float64, so that float64 models stay exact (loading rounds to the model's dtype).

    Args:
        state_dict (Mapping[str, Tensor]): Official names and tensors.

    Returns:
        dict[str, Tensor]: Our names and tensors.

    Raises:
        ValueError: If the state dict is not official or contains unknown names.
    """
    names = official_names(state_dict)
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(
            f'Unknown names in an official Vision-LSTM state dict: {", ".join(unknown)}.'
        )
    return {
        name: state_dict[key].double() + 1 if _STACK_NORM_WEIGHT.match(name) else state_dict[key]
        for key, name in names.items()
    }


def official_names(state_dict: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Map the names in an official state dict to ours.

    Args:
        state_dict (Mapping[str, Tensor]): Official names and tensors.

    Returns:
        dict[str, str | None]: From each official name to ours, or to None if a Vision-LSTM has no
        such tensor. Masks that were stored by accident are omitted.

    Raises:
        ValueError: If the state dict is not official.
    """
    if not is_official(state_dict):
        raise ValueError(
            'This is not an official Vision-LSTM state dict: it has no mLSTM cells, neither '
            "'xlstm.blocks.*.mlstm_cell.*' nor 'blocks.*.mlstm_cell.*', but "
            f'{", ".join(list(state_dict)[:3])} …'
        )
    if any(key.startswith('xlstm.') for key in state_dict):
        norm, pool_norm, head = 'xlstm.post_blocks_norm', 'head.0', 'head.1'
    elif any('rowwise_from' in key for key in state_dict):
        norm, pool_norm, head = 'norm', 'legacy_norm', 'head'
    else:  # the two norms of standalone models swapped roles between versions
        norm, pool_norm, head = 'legacy_norm', 'norm', 'head'
    outside = {
        'patch_embed.proj': 'backbone.patch_embed.projection',
        norm: 'backbone.norm',
        pool_norm: 'backbone.pool_norm',
        head: 'head.fc',
    }
    names = {}
    for key in state_dict:
        module, _, parameter = key.rpartition('.')
        if key == 'pos_embed.embed':
            names[key] = 'backbone.pos_embed'
        elif module in outside:
            names[key] = f'{outside[module]}.{parameter}'
        elif parameter != 'causal_mask':
            block = _OFFICIAL_BLOCK.fullmatch(key)
            names[key] = _name_in_block(**block.groupdict()) if block else None
    return names


def _name_in_block(number: str, corner: str | None, rest: str) -> str | None:
    """Our name for a block's parameter, or None if it is unknown."""
    block = int(number)
    if corner:
        block = 2 * block + (corner == 'bot_right')
    module, _, parameter = rest.rpartition('.')
    if rest == 'learnable_skip':
        return f'backbone.layers.{block}.skip'
    if module in _BLOCK_NAMES:
        return f'backbone.layers.{block}.{_BLOCK_NAMES[module]}.{parameter}'
    return None


def check_blocks(state_dict: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if a block of a classifier in our layout is missing, or its tensors differ
    in name or shape from those of the first block.
    """
    blocks = defaultdict(set)
    for key, value in state_dict.items():
        if match := _BLOCK.match(key):
            blocks[int(match[1])].add((match[2], tuple(value.shape)))
    for block in range(1 + max(blocks, default=0)):
        if differing := dict(sorted(blocks[block] ^ blocks[0])):
            raise ValueError(
                f'Block {block} does not have the tensors of block 0: they differ in '
                f'{", ".join(differing)}.'
            )


def infer_architecture(state_dict: Mapping[str, Tensor]) -> dict:
    """Infer the sizes of a classifier from its tensors.

    The patch stride cannot be inferred: the position embedding has one entry per non-overlapping
    patch, even in models with overlapping ones.

    Args:
        state_dict (Mapping[str, Tensor]): A classifier in our layout, see :func:`vil_to_mmvil`.

    Returns:
        dict: version, embed_dims, depth, num_heads, patch_size, in_channels, img_size (height and
        width), out_type, num_classes.

    Raises:
        ValueError: If a required tensor is missing or has an impossible shape.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        tensor = state_dict.get(name)
        if tensor is None or tensor.dim() != dims:
            found = 'missing' if tensor is None else f'of shape {tuple(tensor.shape)}'
            raise ValueError(
                f'A Vision-LSTM classifier needs {name} (converted name) with {dims} dimensions, '
                f'but it is {found}.'
            )
        return tuple(tensor.shape)

    embed_dims, in_channels, _, patch_size = shape('backbone.patch_embed.projection.weight', 4)
    _, rows, columns, _ = shape('backbone.pos_embed', 4)
    num_heads, _ = shape('backbone.layers.0.igate.weight', 2)
    num_classes, _ = shape('head.fc.weight', 2)
    (pooled,) = shape('backbone.pool_norm.weight', 1)
    conv = state_dict.get('backbone.layers.0.conv.weight')
    return dict(
        # Version 1 convolves along the tokens, version 2 over the image.
        version=1 if conv is not None and conv.dim() == 3 else 2,
        embed_dims=embed_dims,
        depth=1 + max(int(match[1]) for match in map(_BLOCK.match, state_dict) if match),
        num_heads=num_heads,
        patch_size=patch_size,
        in_channels=in_channels,
        img_size=(rows * patch_size, columns * patch_size),
        out_type='bilateral_concat' if pooled == 2 * embed_dims else 'bilateral_avg',
        num_classes=num_classes,
    )
