# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch

import mmvil
from mmvil.apis.measure import add_ratios, compare, saved_bytes


def vil_saved(size, device='meta', **options):
    model = mmvil.VisionLSTM(img_size=size, out_type='bilateral_concat', **options).to(device)
    return saved_bytes(model, torch.empty(1, 3, size, size, device=device))


# Bounds are what timm's DeiT of the same width saves, in 1e6 bytes.
@pytest.mark.parametrize(
    'arch,size,bound', [('tiny', 224, 28.6), ('tiny', 512, 149), ('base', 512, 586)]
)
def test_vil_saves_less_than_deit(arch, size, bound):
    saved = vil_saved(size, arch=arch)
    width, tokens = {'tiny': 192, 'base': 768}[arch], (size // 16) ** 2
    assert saved <= bound * 1e6
    # 7 D values per token and block, a few scalars, the image and the ends of the network.
    assert saved >= 24 * 7 * width * tokens * 4
    assert saved <= 1.08 * 24 * 7 * width * tokens * 4


def test_saved_bytes_are_linear_and_need_the_lean_layer():
    options = dict(arch='tiny')
    assert vil_saved(1024, **options) <= 4.2 * vil_saved(512, **options)
    assert vil_saved(224, lean=False, **options) > 3 * vil_saved(224, **options)


def test_saved_bytes_are_the_same_on_a_real_device():
    options = dict(arch=dict(embed_dims=64, depth=3))
    assert vil_saved(64, 'cpu', **options) == vil_saved(64, 'meta', **options)


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            y = x * self.weight  # x and the weight
            return y * y.view(-1, 4)  # y, twice

    assert saved_bytes(Model(), torch.randn(8, 4)) == 2 * 8 * 4 * 4


def test_ratio_is_the_median_of_the_ratios_inside_rounds():
    records = [
        dict(model=name, size=32, mode='forward', seconds_per_image=times)
        for name, times in (('A', [1.0, 2.0, 4.0]), ('B', [2.0, 4.0, 4.0]))
    ]
    add_ratios(records, 'A')
    assert [r['time_ratio'] for r in records] == [1, 2]
    assert {r['ratio_to'] for r in records} == {'A'}


def test_compare_survives_a_model_that_needs_too_much_memory(capsys):
    def too_large(size):
        raise RuntimeError('CUDA out of memory')

    builders = {
        'small': lambda size: mmvil.VisionLSTM(arch=dict(embed_dims=16, depth=1), img_size=size),
        'large': too_large,
    }
    lines = []
    records = compare(builders, torch.randn(2, 3, 32, 32), rounds=1, progress=lines.append)
    assert [(r['model'], r['mode'], r['batch']) for r in records] == [
        ('small', 'forward', 2),
        ('small', 'training', 2),
    ]
    assert lines[-1] == '32 x 32, training: round 1 of 1'
    assert all(r['time_ratio'] == 1 for r in records)

    records = compare(dict(reversed(builders.items())), torch.randn(2, 3, 32, 32), rounds=1)
    assert [(r['ratio_to'], r['time_ratio']) for r in records] == [('large', None)] * 2
    assert 'large: out of memory' in capsys.readouterr().out


def test_compare_does_not_take_other_errors_for_a_lack_of_memory():
    def broken(size):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    with pytest.raises(RuntimeError, match='illegal'):
        compare(dict(broken=broken), torch.randn(2, 3, 32, 32), rounds=1)
