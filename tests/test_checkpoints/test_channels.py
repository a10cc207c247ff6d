# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmvil.checkpoints import adapt_input_channels


def test_one_channel_gives_what_its_rgb_copy_gives():
    weight, gray = torch.randn(8, 3, 4, 4), torch.randn(2, 1, 4, 4)
    expected = torch.nn.functional.conv2d(gray.expand(-1, 3, -1, -1), weight)
    actual = torch.nn.functional.conv2d(gray, adapt_input_channels(weight, 1))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('in_channels', [1, 2, 4, 8, 13])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_more_channels_repeat_in_turn_as_in_timm(in_channels, dtype):
    manipulate = pytest.importorskip('timm.models._manipulate')
    weight = torch.randint(-99, 99, (8, 3, 4, 4)).to(dtype)  # sums are exact in any order
    adapted = adapt_input_channels(weight, in_channels)
    assert adapted.shape == (8, in_channels, 4, 4) and adapted.dtype == dtype
    torch.testing.assert_close(adapted, manipulate.adapt_input_conv(in_channels, weight))


def test_equal_channels_stay_as_they_are():
    for channels in (1, 3, 5):
        weight = torch.randn(8, channels, 4, 4)
        assert adapt_input_channels(weight, channels) is weight


@pytest.mark.parametrize('given, in_channels', [(1, 3), (4, 3), (4, 8)])
def test_other_channels_than_rgb_are_rejected(given, in_channels):
    with pytest.raises(ValueError, match=f'{given} input channels, .* in_channels={in_channels}: '):
        adapt_input_channels(torch.randn(8, given, 4, 4), in_channels)
