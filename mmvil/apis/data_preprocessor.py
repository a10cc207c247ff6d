# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Normalization of images with any number of channels. Configs name this by its dotted path;
mmvil does not import it, because importing mmseg is slow.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import SegDataPreProcessor


class MultibandSegDataPreProcessor(SegDataPreProcessor):
    """mmseg's data preprocessor with a mean and a standard deviation for each of any number of
    channels; mmengine's, on which it is built, takes 1 or 3. mmpretrain's needs no such help.

    Args:
        mean (Sequence[float]): One value per channel.
        std (Sequence[float]): One value per channel.
        **kwargs: Further arguments of ``mmseg.SegDataPreProcessor``.

    Raises:
        ValueError: If there are not as many values in one as in the other.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs: Any) -> None:
        if len(mean) != len(std):
            raise ValueError(
                f'mean and std need one value per channel each, but have {len(mean)} and '
                f'{len(std)} values.'
            )
        super().__init__(**kwargs)
        self._enable_normalize = True
        for name, values in (('mean', mean), ('std', std)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
