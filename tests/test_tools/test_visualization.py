# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import SEGMENTOR, save_random_model
from tool_process import call_tool

from mmvil import VisionLSTM
from mmvil.ops import mlstm, mlstm_reference

SCRIPT = Path(__file__).parents[2] / 'tools/visualization/plot_log.py'


def write_log(work_dir, started, scalars):
    path = work_dir / started / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, scalars)))


def plot_log(*args):
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)


def test_plot_log_draws_resumed_run(tmp_path):
    write_log(tmp_path, '20240101_000000', [dict(loss=2.0, step=10), dict(loss=1.5, step=20)])
    write_log(tmp_path, '20240101_010000', [dict(loss=1.4, step=20), dict(mIoU=50.0, step=20)])
    write_log(tmp_path, '20240101_020000', [])  # a test run logs nothing here
    out = tmp_path / 'pictures/curve.png'
    result = plot_log(tmp_path, '--out', out)
    assert result.returncode == 0, result.stderr
    assert Image.open(out).width > 400


def test_plot_log_says_what_is_missing(tmp_path):
    result = plot_log(tmp_path / 'nowhere')
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert '--work-dir of a training run' in result.stderr


LOOK_INSIDE = SCRIPT.with_name('look_inside.py')


@pytest.fixture(scope='module')
def look_inside():
    folders = [str(LOOK_INSIDE.parents[1]), str(LOOK_INSIDE.parent)]
    sys.path[:0] = folders
    try:
        import look_inside

        return look_inside
    finally:
        for folder in folders:
            sys.path.remove(folder)


def small_backbone(**options):
    torch.manual_seed(0)
    backbone = VisionLSTM(arch=dict(embed_dims=16, depth=2), img_size=48, **options).eval()
    for name, parameter in backbone.named_parameters():
        if 'gate.weight' in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.mark.parametrize('picture', ['gates', 'decay', 'receptive_field', 'pca'])
def test_look_inside_draws(picture, tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    generator = np.random.default_rng(0)
    for i in range(2):
        noise = generator.integers(0, 255, (48, 80, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f'{i}.png')
    out = tmp_path / 'new' / f'{picture}.png'
    said = call_tool(LOOK_INSIDE, picture, tmp_path, config, checkpoint, '--out', out)
    assert f'Picture: {out}' in said
    drawn = np.asarray(Image.open(out).convert('RGB'))
    assert drawn.shape[1] > 400 and len(np.unique(drawn)) > 100


def test_look_inside_says_which_blocks_there_are(tmp_path):
    config, checkpoint = save_random_model(tmp_path, SEGMENTOR)
    Image.new('RGB', (64, 64)).save(tmp_path / 'image.png')
    said = call_tool(
        *(LOOK_INSIDE, 'gates', tmp_path / 'image.png', config, checkpoint, '--blocks', 0, 7),
        status=2,
    )
    assert 'error: --blocks must be between 0 and 1, but are [0, 7]' in said


@pytest.mark.parametrize('version', [1, 2])
def test_gates_are_those_that_the_cell_reads(look_inside, version, monkeypatch):
    backbone = small_backbone(version=version, lean=False)
    read = []

    def spy(*args, **kwargs):
        read.append((kwargs['igate'], kwargs['fgate']))
        return mlstm(*args, **kwargs)

    monkeypatch.setattr('mmvil.layers.vil_block.mlstm', spy)
    with torch.no_grad(), look_inside.recorded(backbone) as records:
        backbone(torch.randn(1, 3, 48, 64))
    assert len(records) == len(read) == 2
    for block, (x, grid, _), expected in zip(backbone.layers, records, read):
        with torch.no_grad():
            gates = look_inside.gates_of(block, x, grid)
        torch.testing.assert_close(gates, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('reverse', [False, True])
def test_decay_weights_are_those_of_the_cell(look_inside, reverse):
    """With q = k = 1 the cell returns the mean of the values by these weights."""
    generator = torch.Generator().manual_seed(0)
    igate, fgate = torch.randn(2, 1, 4, 12, generator=generator, dtype=torch.float64)
    igate = igate + 20  # so that the sum of the weights is the denominator
    value = torch.rand(1, 4, 12, 1, generator=generator, dtype=torch.float64)
    one = torch.ones_like(value)
    h = mlstm_reference(one, one, value, igate, fgate, reverse)
    for token in (0, 5, 11):
        weights = look_inside.decay_weights(igate, fgate, reverse, token)
        assert weights.max().item() == pytest.approx(1)
        expected = (weights * value[..., 0]).sum(-1) / weights.sum(-1)
        torch.testing.assert_close(h[:, :, token, 0], expected, rtol=1e-5, atol=0)


def test_half_life_of_known_gates(look_inside):
    gates = torch.logit(torch.tensor([0.5, 0.25, 0.5**0.1]))
    expected = torch.tensor([1, 0.5, 10], dtype=torch.float64)
    torch.testing.assert_close(look_inside.half_life(gates), expected, rtol=1e-5, atol=0)


def test_receptive_field_is_what_has_been_read(look_inside):
    """After one forward block of version 1, with its causal convolution: nothing to come."""
    backbone = small_backbone(version=1)
    at = (0.5, 0.5)
    (first, both) = look_inside.receptive_field(backbone, [torch.randn(1, 3, 48, 48)], [0, 1], at)
    assert first.shape == (48, 48) and first.max() == pytest.approx(1)
    assert (first[:16] > 0).all() and (first[16:32, :32] > 0).all()  # rows above, tokens before
    assert (first[16:32, 32:] == 0).all() and (first[32:] == 0).all()
    assert (both > 0).mean() > 0.99


def test_principal_colors_are_the_strongest_directions(look_inside):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator)).Q[:3]
    strengths = torch.randn(400, 3, generator=generator) * torch.tensor([9.0, 3, 1])
    tokens = strengths @ basis + 0.001 * torch.randn(400, 10, generator=generator)
    colors = np.concatenate(look_inside.principal_colors([tokens[:150], tokens[150:]]))
    assert colors.shape == (400, 3) and colors.min() == 0 and colors.max() == 1
    for i in range(3):
        assert abs(np.corrcoef(colors[:, i], strengths[:, i])[0, 1]) > 0.95


def test_default_blocks_show_both_directions(look_inside):
    backbone = VisionLSTM(arch=dict(embed_dims=16, depth=12), img_size=32, out_indices=(3, 7, 11))
    assert look_inside.default_blocks(backbone, pairs=False) == [3, 7, 11]
    pairs = look_inside.default_blocks(backbone, pairs=True)
    assert pairs == [0, 1, 6, 7, 10, 11]
