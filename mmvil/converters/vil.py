# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Official Vision-LSTM state dicts to ours."""

import re
from collections import OrderedDict
from typing import Dict, Mapping

from torch import Tensor

# Official names within a block (both layouts, after the block's prefix) and ours.
_BLOCK_NAMES = {
    'xlstm_norm': 'norm',
    'norm': 'norm',
    'proj_up': 'proj_up',
    'q_proj': 'q_proj',
    'k_proj': 'k_proj',
    'v_proj': 'v_proj',
    'conv1d': 'conv',
    'conv1d.conv': 'conv',
    'conv': 'conv',
    'conv.conv': 'conv',
    'mlstm_cell.igate': 'igate',
    'mlstm_cell.fgate': 'fgate',
    'mlstm_cell.outnorm': 'out_norm',
    'proj_down': 'proj_down',
}
_TRAINING = re.compile(r'^xlstm\.blocks\.(?P<block>\d+)\.(xlstm\.)?(?P<rest>.+)$')
_STANDALONE = re.compile(
    r'^blocks\.(?P<block>\d+)\.'
    r'((?P<direction>rowwise_from_top_left|rowwise_from_bot_right)\.)?(layer\.)?(?P<rest>.+)$'
)


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has one of the official layouts."""
    return 'pos_embed.embed' in state_dict and any(
        _TRAINING.match(key) or _STANDALONE.match(key) for key in state_dict
    )


def vil_to_mmvil(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Convert an official state dict to the layout of mmpretrain's ``ImageClassifier``
    (``backbone.*``, ``head.fc.*``).

    Both official layouts are understood: that of the training checkpoints (``xlstm.blocks.*``) and
        that of the standalone
    models (``blocks.*``, ``norm``, ``legacy_norm``), versions 1 and 2. The norms inside the block
    stack store their weight minus 1; the 1 is added here in float64, so that a float64 model loses
    no digit (loading rounds to the model's dtype).

    Args:
        state_dict (Mapping[str, Tensor]): Official names and tensors.

    Returns:
        dict[str, Tensor]: Our names and tensors.

    Raises:
        ValueError: If the state dict is not an official one, or a name in it is not known.
    """
    if not is_official(state_dict):
        raise ValueError(
            "This is not an official Vision-LSTM state dict: it has no 'pos_embed.embed' beside "
            "'xlstm.blocks.*' or 'blocks.*'."
        )
    converted = OrderedDict()
    unknown = []
    names = _outer_names(state_dict)
    for key, value in state_dict.items():
        if key.endswith('causal_mask'):  # a buffer that was stored by accident
            continue
        name = names.get(key.rpartition('.')[0])
        name = f'{name}.{key.rpartition(".")[2]}' if name else _block_name(key)
        if key == 'pos_embed.embed':
            name = 'backbone.pos_embed'
        if name is None:
            unknown.append(key)
            continue
        inside_stack = re.match(r'backbone\.(layers\.\d+\.(out_)?norm|norm)\.weight$', name)
        converted[name] = value.double() + 1 if inside_stack else value
    if unknown:
        raise ValueError(
            f'Unknown names in an official Vision-LSTM state dict: {unknown[:5]}'
            + (f' and {len(unknown) - 5} more.' if len(unknown) > 5 else '.')
        )
    return converted


def _block_name(key: str):
    """Our name of a parameter of a block, or None."""
    match = _TRAINING.match(key)
    if match:
        block = int(match['block'])
    else:
        match = _STANDALONE.match(key)
        if not match:
            return None
        block = int(match['block'])
        if match['direction']:  # version 2 counts pairs
            block = 2 * block + (match['direction'] == 'rowwise_from_bot_right')
    rest = match['rest']
    if rest == 'learnable_skip':
        return f'backbone.layers.{block}.skip'
    module, _, parameter = rest.rpartition('.')
    return (
        f'backbone.layers.{block}.{_BLOCK_NAMES[module]}.{parameter}'
        if module in _BLOCK_NAMES
        else None
    )


def _outer_names(state_dict: Mapping[str, Tensor]) -> Dict[str, str]:
    """Names of the modules outside the blocks."""
    names = {'patch_embed.proj': 'backbone.patch_embed.projection'}
    if any(key.startswith('xlstm.') for key in state_dict):
        names.update(
            {
                'xlstm.post_blocks_norm': 'backbone.norm',
                'head.0': 'backbone.pool_norm',
                'head.1': 'head.fc',
            }
        )
    else:
        # The standalone models swapped the roles of their two norms between the versions.
        version2 = any('rowwise_from' in key for key in state_dict)
        names.update(
            {
                'norm': 'backbone.norm' if version2 else 'backbone.pool_norm',
                'legacy_norm': 'backbone.pool_norm' if version2 else 'backbone.norm',
                'head': 'head.fc',
            }
        )
    return names
