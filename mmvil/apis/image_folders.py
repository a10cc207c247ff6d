# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Segmentation dataset of images with several suffixes. Configs refer to it by its dotted path;
mmvil does not import it, because importing mmseg is slow.
"""

from collections.abc import Sequence
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class MixedSuffixDataset(BaseSegDataset):
    """``mmseg.BaseSegDataset`` of all images in a folder that have one of several suffixes.

    Args:
        img_suffix (Sequence[str]): The suffixes.
        **kwargs: Further arguments of ``mmseg.BaseSegDataset``, except for ``ann_file``.
    """

    def __init__(self, img_suffix: Sequence[str], **kwargs: Any) -> None:
        super().__init__(img_suffix=tuple(img_suffix), **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images, sorted by path, and their annotations."""
        suffixes, samples = self.img_suffix, []
        for suffix in suffixes:
            self.img_suffix = suffix  # the base class lists the images of one
            samples += super().load_data_list()
        self.img_suffix = suffixes
        return sorted(samples, key=lambda sample: sample['img_path'])
