# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Normalization of images with any number of channels. Configs refer to this by its dotted path;
mmvil does not import it, because importing mmseg is slow.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import SegDataPreProcessor


class MultibandSegDataPreProcessor(SegDataPreProcessor):
    """mmseg's data preprocessor for any number of channels. Its base class in mmengine supports 1
    or 3; mmpretrain's supports any number.

    Args:
        mean (Sequence[float]): One value per channel.
        std (Sequence[float]): One value per channel.
        **kwargs: Further arguments of ``mmseg.SegDataPreProcessor``.

    Raises:
        ValueError: If mean and std differ in length.
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
