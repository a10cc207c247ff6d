# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""tools/model_converters/vil_to_mmvil.py, and what mmpretrain makes of its files."""

import pytest
import torch
from tool_process import call_tool

from tests.conftest import ROOT, relative_error

SCRIPT = ROOT / 'tools/model_converters/vil_to_mmvil.py'


def convert(*arguments, status=0):
    pytest.importorskip('mmpretrain')
    return call_tool(SCRIPT, *arguments, status=status)


def test_converted_file_computes_the_reference_logits_in_mmpretrain(tmp_path):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    source, target = tmp_path / 'small.th', tmp_path / 'small.pth'
    torch.save(dict(state_dict=data['state_dict']), source)
    said = convert(source, target, '--check')
    assert 'ViL version 2, 4 blocks, 32 wide, 4 heads, patch size 16, stride 16 (assumed' in said
    assert 'image size 64x64, 10 classes' in said and 'SHA-256 of small.th: ' in said
    assert 'Checked: ' in said and 'load strictly' in said
    assert sorted(tmp_path.iterdir()) == [target, source]

    from mmengine.config import Config
    from mmpretrain import get_model

    cfg = torch.load(target, weights_only=True)['meta']['cfg']
    model = get_model(Config.fromstring(cfg, '.py'), pretrained=str(target))
    assert relative_error(model(data['image']), data['logits']) < 1e-5

    assert f'{target} exists' in convert(source, target, status=2)
    convert(source, target, '--force')


@pytest.mark.parametrize('name', ['vil2_dim32', 'vil1_dim32', 'vil1_dim32_stride8'])
def test_reference_vectors_pass_through_the_converter(reference, tmp_path, name):
    data = reference(name)
    torch.save(data['checkpoint'], tmp_path / f'{name}.th')
    convert(tmp_path / f'{name}.th', tmp_path / 'a.pth')

    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    converted = torch.load(tmp_path / 'a.pth', weights_only=True)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(Config.fromstring(converted['meta']['cfg'], '.py').model)
    model.load_state_dict(converted['state_dict'], strict=True)
    model.double().eval()
    for case in data['cases']:
        # The file holds 1 + weight of norms in float32, hence not 1e-9.
        assert relative_error(model(case['image'].double()), case['logits']) < 1e-6


def test_failure_is_one_line_and_leaves_no_file(tmp_path):
    data = torch.load(ROOT / 'tests/data/vil2_dim32.pt', weights_only=True)
    state = {key: x for key, x in data['state_dict'].items() if key != 'head.1.bias'}
    torch.save(dict(state_dict=state), tmp_path / 'a.th')
    said = convert(tmp_path / 'a.th', tmp_path / 'a.pth', '--check', status=2)
    (line,) = [line for line in said.splitlines() if line.startswith('error: ')]
    assert '1 of 93 tensors are missing (head.fc.bias)' in line

    nan = {**data['state_dict'], 'head.1.bias': torch.full((10,), float('nan'))}
    torch.save(dict(state_dict=nan), tmp_path / 'a.th')
    said = convert(tmp_path / 'a.th', tmp_path / 'a.pth', '--check', status=2)
    assert 'error: the converted model gives no finite logits' in said

    said = convert(tmp_path / 'nothing.th', tmp_path / 'a.pth', status=2)
    assert 'error: Checkpoint not found: ' in said and 'Traceback' not in said
    assert [path.name for path in tmp_path.iterdir()] == ['a.th']
