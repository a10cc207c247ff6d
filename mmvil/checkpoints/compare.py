# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Compare a state dict with that of a model."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor


def describe_misfit(
    state_dict: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    optional: Collection[str] = (),
    strict: bool = False,
    limit: int | None = 4,
) -> str:
    """Describe how a state dict does not fit a model.

    Args:
        state_dict (Mapping[str, Tensor]): Tensors to be loaded.
        wanted (Mapping[str, Tensor]): State dict of the model.
        optional (Collection[str]): Names that may be missing.
        strict (bool): Also report names that the model does not have. Default: False.
        limit (int, optional): Number of tensors to list per kind of mismatch. Default: 4.

    Returns:
        str: Missing tensors, tensors of other shapes, and unknown ones; empty if everything fits.
    """
    total = f'of {len(wanted)} tensors'
    missing = [name for name in wanted if name not in state_dict and name not in optional]
    misshapen = [
        f'{name}: {tuple(state_dict[name].shape)} in the file, {tuple(tensor.shape)} in the model'
        for name, tensor in wanted.items()
        if name in state_dict and not fits(name, state_dict[name], tensor)
    ]
    unknown = [name for name in state_dict if name not in wanted] if strict else []
    problems = []
    if missing:
        none_fits = len(missing) == len(wanted) and state_dict and not strict
        instead = f'; instead, there are {summarize([*state_dict])}' if none_fits else ''
        problems.append(
            f'{len(missing)} {total} are missing ({summarize(missing, limit)}){instead}'
        )
    if misshapen:
        listed = summarize(misshapen, limit, '; ')
        problems.append(f'{len(misshapen)} {total} have another shape ({listed})')
    if unknown:
        problems.append(f'{len(unknown)} are unknown ({summarize(unknown, limit)})')
    return ' and '.join(problems)


def fits(name: str, given: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor can be loaded: it has the right shape, or is a position embedding, whose
    grid the backbone resizes.
    """
    if name.endswith('pos_embed'):
        return given.dim() == wanted.dim() and given.shape[-1] == wanted.shape[-1]
    return given.shape == wanted.shape


def summarize(names: Sequence[str], limit: int | None = 4, separator: str = ', ') -> str:
    """List the first names and count the others."""
    rest = len(names) - len(names[:limit])
    return (separator.join(names[:limit]) or 'nothing') + (f' and {rest} more' if rest else '')
