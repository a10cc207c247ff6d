# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Checkpoints published by the authors of Vision-LSTM."""

from dataclasses import dataclass

OFFICIAL_URL = 'https://ml.jku.at/research/vision_lstm/download/'


@dataclass(frozen=True)
class OfficialCheckpoint:
    """A published checkpoint file.

    Args:
        model (str): Name of the model for ``mmvil.get_model``, as used by the authors.
        file (str): Name of the file.
        version (int): Version of the model.
        arch (str): ``arch`` of :class:`mmvil.VisionLSTM`.
        top1 (float): Published top-1 accuracy on ImageNet-1K in percent.
        stride (int): Step between patches in pixels. Patches are 16 x 16, images 224 x 224.
    """

    model: str
    file: str
    version: int
    arch: str
    top1: float
    stride: int = 16

    @property
    def name(self) -> str:
        """Short name for ``mmvil://NAME``, such as 'vil2_tiny16' for the model 'vil2-tiny'."""
        version, arch, *variant = self.model.split('-')
        return '_'.join([version, f'{arch}16', *variant])

    @property
    def epochs(self) -> int:
        return int(self.file.split('_e')[1][:3])

    @property
    def url(self) -> str:
        return OFFICIAL_URL + self.file


_ROWS = (
    ('vil2-tiny', 'vil2_tiny16_e800_in1k.th', 2, 'tiny', 78.3),
    ('vil2-tiny-e400', 'vil2_tiny16_e400_in1k.th', 2, 'tiny', 77.2),
    ('vil2-small', 'vil2_small16_e400_in1k.th', 2, 'small', 81.5),
    ('vil2-base', 'vil2_base16_e400_in1k.th', 2, 'base', 82.4),
    ('vil-tiny', 'vil_tiny16_e800_in1k.th', 1, 'tiny', 77.3),
    ('vil-tiny-e400', 'vil_tiny16_e400_in1k.th', 1, 'tiny', 76.1),
    ('vil-tinyplus', 'vil_tinyplus16_e800_in1k.th', 1, 'tiny_plus', 78.1),
    ('vil-tinyplus-e400', 'vil_tinyplus16_e400_in1k.th', 1, 'tiny_plus', 77.2),
    ('vil-small', 'vil_small16_e400_in1k.th', 1, 'small', 80.7),
    ('vil-smallplus', 'vil_smallplus16_e400_in1k.th', 1, 'small_plus', 80.9),
    ('vil-smallplus-stride8', 'vil_smallplus16_e400_in1k_stride8.th', 1, 'small_plus', 82.2, 8),
    ('vil-base', 'vil_base16_e400_in1k.th', 1, 'base', 81.6),
    ('vil-base-stride8', 'vil_base16_e400_in1k_stride8.th', 1, 'base', 82.7, 8),
)
OFFICIAL_CHECKPOINTS = tuple(OfficialCheckpoint(*row) for row in _ROWS)


def find_official(address: str) -> OfficialCheckpoint:
    """Find a published checkpoint by its address.

    Args:
        address (str): ``mmvil://NAME`` with a short name or file name, the URL of the file, or the
            name of the model.

    Raises:
        ValueError: If there is none; the message lists the short names.
    """
    wanted = address.removeprefix('mmvil://').removeprefix(OFFICIAL_URL)
    for each in OFFICIAL_CHECKPOINTS:
        if wanted in (each.name, each.model, each.file, each.file.removesuffix('.th')):
            return each
    known = ', '.join(each.name for each in OFFICIAL_CHECKPOINTS)
    raise ValueError(f'No official checkpoint is called {address!r}; known names are {known}.')
