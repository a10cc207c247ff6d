# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Annotations whose pixels are not class indices. Configs refer to this by its dotted path; mmvil
does not import it, because importing mmseg is slow.
"""

from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
from mmengine.fileio import get
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

from ..engine.sampling import UnknownLabelsError

IGNORED, UNKNOWN = 255, 254


@TRANSFORMS.register_module()
class LoadMappedAnnotations(LoadAnnotations):
    """Load annotations with arbitrary values or colors and map them to class indices.

    mmsegmentation's ``LoadAnnotations`` treats pixels as class indices and keeps the low 8 bits:
    the foreground of a 0/255 mask becomes the ignored label, an RGB mask three label maps.

    Args:
        values (Sequence[int | Sequence[int]], optional): One or several values of each class, in
            single-channel annotations of 8 or 16 bits, with or without a palette. Default: None,
            for class indices.
        colors (Sequence[Sequence[int]], optional): The RGB color of each class, in annotations with
            three or four channels. Default: None.
        ignore (Sequence[int | Sequence[int]]): Values and RGB colors of pixels without a label. The
            value 255 is always ignored, unless it belongs to a class.
        **kwargs: Further arguments of ``mmseg.LoadAnnotations``.

    Raises:
        ValueError: If a value or color belongs to two classes.
    """

    def __init__(
        self,
        values: Sequence[int | Sequence[int]] | None = None,
        colors: Sequence[Sequence[int]] | None = None,
        ignore: Sequence[int | Sequence[int]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        ignored_values = {value for value in ignore if isinstance(value, int)}
        ignored_colors = {_pack(np.array(color)) for color in ignore if not isinstance(color, int)}
        if values is None:
            values = [[] if value in ignored_values else value for value in range(UNKNOWN)]
        values = [[value] if isinstance(value, int) else value for value in values]
        if not any(IGNORED in group for group in values):
            ignored_values.add(IGNORED)
        self.values = _table(2**16, values, ignored_values)
        self.colors = None
        if colors is not None:
            codes = [[_pack(np.array(color))] for color in colors]
            self.colors = _table(2**24, codes, ignored_colors)

    def to_labels(self, mask: np.ndarray) -> np.ndarray:
        """Map values (H, W) or colors (H, W, C) in RGB or RGBA to labels, (H, W) uint8.

        Raises:
            UnknownLabelsError: If a value or color belongs to no class.
        """
        is_colored = mask.ndim == 3 and mask.shape[2] >= 3
        if is_colored and self.colors is None:
            raise ValueError('has colors, but no class colors are declared')
        gray = mask if mask.ndim == 2 else mask[..., 0]  # a second channel is opacity
        codes = _pack(mask) if is_colored else gray.astype(np.int32)
        table = self.colors if is_colored else self.values
        labels = table[np.clip(codes, -1, len(table) - 1)]  # the last entry is UNKNOWN
        if (labels == UNKNOWN).any():
            found = np.unique(codes[labels == UNKNOWN]).tolist()
            if is_colored:
                found = [(code >> 16, code >> 8 & 255, code & 255) for code in found]
            kind = 'colors' if is_colored else 'values'
            raise UnknownLabelsError(f'has {kind} of no class', found)
        return labels

    def _load_seg_map(self, results: dict) -> None:
        # mmseg's inference removes LoadAnnotations by name from a pipeline without labels.
        if 'seg_map_path' not in results:
            return
        if self.reduce_zero_label or results.get('reduce_zero_label') or results.get('label_map'):
            raise ValueError('use values and ignore instead of reduce_zero_label and other classes')
        path = results['seg_map_path']
        content = get(path, backend_args=self.backend_args)
        mask = mmcv.imfrombytes(content, flag='unchanged', backend=self.imdecode_backend)
        if mask.ndim == 3 and mask.shape[2] >= 3:
            mask = mask[..., 2::-1]  # BGR(A)
        try:
            results['gt_seg_map'] = self.to_labels(mask)
        except ValueError as error:
            raise ValueError(f'the annotation {path} {error}') from None
        results['seg_fields'].append('gt_seg_map')


def _pack(colors: np.ndarray) -> np.ndarray:
    """Pack each RGB color (..., 3) into one number."""
    red, green, blue = np.moveaxis(colors[..., :3].astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _table(size: int, codes: Sequence[Sequence[int]], ignored: set[int]) -> np.ndarray:
    """Build a lookup table from code to label, (size + 1,) uint8."""
    if len(codes) > UNKNOWN:
        raise ValueError(f'there may be at most {UNKNOWN} classes, but {len(codes)} are declared')
    table = np.full(size + 1, UNKNOWN, np.uint8)
    for label, group in [*enumerate(codes), (IGNORED, ignored)]:
        for code in group:
            if not 0 <= code < size:
                raise ValueError(f'values must be 0 to {size - 1}, but one is {code}')
            if table[code] not in (UNKNOWN, label):
                both = f'{table[code]} and {label}'
                raise ValueError(f'a value or color has two labels, {both} (255: ignored)')
            table[code] = label
    return table
