"""The FLOP formulas count what is multiplied; the tools report what they should."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmvil
from mmvil.ops import mlstm
from mmvil.ops.chunkwise import chunkwise_backward, chunkwise_forward
from mmvil.ops.flops import flop_formulas, mlstm_flops
from mmvil.ops.log import warn_once

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools/analysis_tools'


@pytest.fixture(scope='module')
def tools():
    """The modules get_flops and benchmark."""
    pytest.importorskip('mmengine')
    sys.path.insert(0, str(TOOLS))
    try:
        import benchmark
        import get_flops

        return get_flops, benchmark
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope='module')
def get_flops(tools):
    return tools[0]


def product_flops(function, *args):
    """FLOPs of all matrix products in a call, the in-place ones included."""
    bmm = {
        getattr(torch.ops.aten, name): lambda y, a, b, *_, **__: 2 * a[0] * a[1] * a[2] * b[2]
        for name in ('baddbmm', 'baddbmm_')
    }
    with FlopCounterMode(display=False, custom_mapping=bmm) as counter:
        function(*args)
    return counter.get_total_flops()


# Several chunks with and without padding, many chunks, one chunk, one token.
@pytest.mark.parametrize('tokens,chunk_size', [(96, 32), (97, 32), (165, 4), (97, 200), (1, 64)])
def test_mlstm_flops_are_those_of_the_products_in_the_code(tokens, chunk_size):
    features = [torch.randn(1, 3, tokens, 8) for _ in range(3)]
    gates = [torch.randn(1, 3, tokens) for _ in range(2)]
    args = (*features, *gates)
    h, normalizer = chunkwise_forward(*args, False, chunk_size)
    assert mlstm_flops((1, 3, tokens, 8), chunk_size) == product_flops(
        chunkwise_forward, *args, False, chunk_size
    )
    assert mlstm_flops((1, 3, tokens, 8), chunk_size, backward=True) == product_flops(
        chunkwise_backward, torch.randn_like(h), *args, h, normalizer, False, chunk_size
    )


def test_mlstm_flops_of_visible_pairs():
    # 10 tokens, one chunk: 55 pairs; chunks of 4, 4 and 2: 10 + 10 + 3 pairs.
    assert mlstm_flops((2, 1, 10, 4), 10, visible_only=True) == 2 * 2 * 2 * 55 * 4
    state = 2 * 4 * 6 * 4  # two chunks of 3 write one, two read it
    assert mlstm_flops((1, 1, 9, 4), 4, visible_only=True) == 2 * (2 * 18 * 4 + state)


def test_mlstm_flops_grow_linearly_by_chunks_and_quadratically_in_one():
    def ratio(chunk_size):
        once, twice = (mlstm_flops((1, 4, tokens, 96), chunk_size) for tokens in (4096, 8192))
        return twice / once

    assert ratio(64) == pytest.approx(2, rel=0.02)  # the first chunk reads no state
    assert ratio(10**6) == 4


def test_formulas_count_depthwise_convolutions_backward():
    conv = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
    image = torch.randn(2, 16, 10, 12, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        y = conv(image)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 2 * 10 * 12 * 16 * 9
    assert counter.get_total_flops() == 3 * forward


def test_operator_is_counted_inside_a_backbone_forward_and_backward():
    model = mmvil.VisionLSTM(arch=dict(embed_dims=16, depth=2), img_size=32)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        (y,) = model(torch.randn(1, 3, 32, 64))
        y.sum().backward()
    counts = counter.get_flop_counts()['Global']
    formulas = (torch.ops.mmvil.mlstm, torch.ops.mmvil.mlstm_backward)
    assert [counts[op] for op in formulas] == [
        2 * mlstm_flops((1, 4, 8, 8), 8, backward) for backward in (False, True)
    ]


@pytest.mark.parametrize('size,published', [('t', 1.5), ('s', 5.1), ('b', 18.6)])
def test_flops_at_224_are_the_published_ones(get_flops, size, published, caplog):
    pytest.importorskip('mmpretrain')
    warn_once.cache_clear()
    model = get_flops.build_model(
        get_flops.load_config(str(ROOT / f'configs/vil_{size}_imagenet.py'), {})
    )
    needed = get_flops.count_multiply_adds(model, (1, 3, 224, 224), needed=True)
    executed = get_flops.count_multiply_adds(model, (1, 3, 224, 224))
    assert needed['total'] == pytest.approx(published * 1e9, rel=0.02)
    assert needed['total'] < executed['total'] < 1.4 * needed['total']
    assert sum(n for part, n in needed.items() if part != 'total') == needed['total']
    assert 'hook' not in caplog.text  # those of the count itself
    # Counting leaves the model as it was.
    assert 'forward' not in vars(model.backbone)
    assert not any(module._forward_hooks for module in model.modules())


def test_flops_of_a_segmentor_by_part_grow_linearly(get_flops):
    pytest.importorskip('mmseg')
    model = get_flops.build_model(
        get_flops.load_config(str(ROOT / 'configs/upernet_vil_t_ade20k.py'), {})
    )
    small, large = (
        get_flops.count_multiply_adds(model, (1, 3, size, size), needed=True)
        for size in (512, 1024)
    )
    assert list(small) == ['backbone', 'decode_head', 'auxiliary_head', 'total']
    assert small['auxiliary_head'] == 0 < small['backbone'] < small['decode_head']
    assert large['backbone'] == pytest.approx(4 * small['backbone'], rel=1e-2)


def call(tool, monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', [tool.__name__, *map(str, arguments)])
    tool.main()


def test_get_flops_prints_a_table_and_writes_json(get_flops, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmseg')
    out = tmp_path / 'new/flops.json'
    config = ROOT / 'configs/upernet_vil_t_camvid.py'
    call(get_flops, monkeypatch, config, '--shape', 360, 480, '--json', out)
    said = capsys.readouterr().out
    assert 'decode_head' in said and 'published' in said
    (count,) = json.loads(out.read_text())['multiply_adds']
    assert count['shape'] == [360, 480]
    assert count['needed']['backbone'] < count['executed']['backbone']

    call(get_flops, monkeypatch, config, '--sizes', 64, 128)
    assert '128 x 128' in capsys.readouterr().out
    with pytest.raises(get_flops.UserError, match='--shape takes height and width'):
        call(get_flops, monkeypatch, config, '--shape', 1, 2, 3)


def test_flops_of_a_config_whose_backbone_is_replaced(get_flops, tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    counts = []
    for config, *options in (
        ('configs/upernet_vil_t_camvid.py',),
        ('configs/upernet_vil_t_camvid.py', '--backbone', 'vil-s'),
    ):
        call(get_flops, monkeypatch, ROOT / config, *options, '--json', tmp_path / 'flops.json')
        counts.append(json.loads((tmp_path / 'flops.json').read_text())['parameters']['backbone'])
    assert 3.5 < counts[1] / counts[0] < 4.2


def test_benchmark_compares_writes_json_and_plots(tools, tmp_path, monkeypatch, capsys):
    pytest.importorskip('timm')
    pytest.importorskip('matplotlib')
    monkeypatch.setattr('mmvil.apis.measure.SECONDS', 0)
    report, picture = tmp_path / 'report.json', tmp_path / 'new/plot.png'
    call(
        tools[1], monkeypatch,
        '--sizes', 64, '--rounds', 1, '--batch', 1, '--device', 'cpu', '--lean', 'on', 'off',
        '--timm', 'resnet10t', '--config', ROOT / 'configs/vil_t_imagenet.py',
        '--json', report, '--plot', picture,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert 'round 1 of 1' in said and 'ratio' in said
    results = json.loads(report.read_text())['results']
    names = ['DeiT-tiny', 'ViL-tiny', 'ViL-tiny keeping all', 'resnet10t', 'vil_t_imagenet']
    assert [(r['size'], r['mode'], r['model']) for r in results] == [
        (64, mode, name) for mode in ('forward', 'training') for name in names
    ]
    assert all(r['time_ratio'] == 1 for r in results if r['model'] == 'DeiT-tiny')
    lean, full, _, from_config = results[1:5]
    assert lean['saved_bytes_per_image'] < full['saved_bytes_per_image'] / 3
    for quantity in ('saved_bytes_per_image', 'multiply_adds_per_image'):
        assert lean[quantity] == from_config[quantity]
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'options,complaint',
    [
        (['--sizes', '100'], 'multiples of 16'),
        (['--batch', '1', '2'], '--batch takes one number or 3'),
    ],
)
def test_benchmark_rejects_invalid_options(tools, options, complaint):
    benchmark = tools[1]
    with pytest.raises(benchmark.UserError, match=complaint):
        benchmark.check(benchmark.make_benchmark_parser().parse_args(options))


@pytest.mark.parametrize('reverse', [False, True])
def test_formulation_of_the_authors_has_the_same_results(monkeypatch, reverse):
    monkeypatch.syspath_prepend(ROOT / 'tools/.dev_scripts')
    authors_mlstm = pytest.importorskip('authors_formulation').authors_mlstm
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64).unbind()
    gates = dict(zip(('igate', 'fgate'), torch.randn(2, 2, 2, 9, dtype=torch.float64).unbind()))
    expected = mlstm(q, k, v, **gates, reverse=reverse, backend='reference')
    torch.testing.assert_close(authors_mlstm(q, k, v, **gates, reverse=reverse), expected)
