# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Whatever comes in, the backbone computes what the plain float64 path does, or says why not."""

import math

import pytest
import torch

import mmvil
from mmvil.ops import mlstm

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ARCH = dict(embed_dims=8, depth=2)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
if torch.__version__ >= '2.3':  # older ones lack operators for the CPU
    DTYPES += [torch.float16]
# Of the largest error, with room for a few layers.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def thorough(examples):
    """Settings of a test: the same examples in each run, few when all tests are to be fast."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def relative_error(actual, expected):
    """Largest error, relative to the size of what is expected."""
    return ((actual.double() - expected).abs().max() / expected.abs().mean().clamp_min(1e-6)).item()


# -- Images of any size, in any layout -------------------------------------------------------------

images = st.fixed_dictionaries(
    dict(
        height=st.integers(1, 600),
        width=st.integers(1, 600),
        batch=st.integers(0, 3),
        channels=st.integers(1, 5),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(['contiguous', 'channels_last', 'transposed', 'sliced', 'expanded']),
        version=st.sampled_from([1, 2]),
        stride=st.sampled_from([8, 16]),
        pyramid=st.booleans(),
        out_type=st.sampled_from(['featmap', 'raw', 'bilateral_concat', 'bilateral_avg']),
        train=st.booleans(),
        seed=st.integers(0, 2**31),
    )
)


def lay_out(image, layout):
    """The same pixels, elsewhere in memory."""
    if layout == 'channels_last':
        return image.contiguous(memory_format=torch.channels_last)
    if layout == 'transposed':
        return image.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == 'sliced':
        return torch.stack([image, image], -1)[..., 0]
    if layout == 'expanded':
        return image[:, :1].expand_as(image)
    return image


def round_anew(image, generator):
    """The same pixels, moved by about one unit in the last place."""
    noise = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return (image.double() * (1 + torch.finfo(image.dtype).eps * noise)).to(image.dtype)


def build(case, **options):
    torch.manual_seed(case['seed'])
    pyramid = case['pyramid'] and case['out_type'] == 'featmap'
    stride = case['stride']
    strides = (stride // 2, stride * 2)
    model = mmvil.VisionLSTM(
        arch=ARCH,
        version=case['version'],
        img_size=32,
        stride=stride,
        in_channels=case['channels'],
        out_indices=(0, 1) if pyramid else -1,
        out_type=case['out_type'],
        pyramid=dict(strides=strides, out_channels=4) if pyramid else None,
        **options,
    )
    with torch.no_grad():  # gates that depend on the tokens, which they do not at the start
        for name, param in model.named_parameters():
            if 'gate.weight' in name:
                param.normal_(std=0.3)
    return model.train(case['train'] and not pyramid)  # batch norm of no image has no statistics


def check_backbone(case):
    height, width = case['height'], case['width']
    generator = torch.Generator().manual_seed(case['seed'])
    image = torch.randn(
        *(case['batch'], case['channels'], height, width),
        generator=generator,
        dtype=torch.float64,
    )
    image = lay_out(image.to(case['dtype']), case['layout'])
    model = build(case).to(case['dtype'])
    if min(height, width) < 16:
        with pytest.raises(ValueError, match='at least one patch|smaller than'):
            model(image)
        return

    plain = build(case, backend='reference', lean=False).to(case['dtype'])
    plain.load_state_dict(model.state_dict())
    images = [image]
    if case['dtype'] not in TOLERANCE and image.numel():
        # A single rounding of a few values may be right by chance: take the worst of eight.
        images += [round_anew(image, generator) for _ in range(7)]
    with torch.no_grad():
        outputs, plain_outputs = model(image), plain(torch.cat(images))
        expected = plain.double()(torch.cat(images).double())
    assert len(outputs) == len(expected)
    for output, plain_output, references in zip(outputs, plain_outputs, expected):
        reference, *others = references.split(max(len(image), 1))
        assert output.shape == reference.shape and output.dtype == case['dtype']
        assert output.isfinite().all()
        if output.numel():
            # What half precision rounds off, a norm may blow up, on the plain path too.
            pairs = zip(plain_output.split(len(image)), (reference, *others))
            inherent = max(relative_error(*pair) for pair in pairs)
            tolerance = (1.1 + 1.5 * output.numel() ** -0.5) * inherent
            tolerance = TOLERANCE.get(case['dtype'], tolerance)
            assert relative_error(output, reference) < tolerance
            assert (output - reference).norm() < 0.05 * reference.norm()
    if case['out_type'] == 'featmap' and not case['pyramid']:
        stride = case['stride']
        grid = [math.ceil(max(side - 16, 0) / stride) + 1 for side in (height, width)]
        assert list(outputs[-1].shape) == [case['batch'], 8, *grid]


@given(images)
@thorough(20)
def test_backbone_equals_the_plain_path(case):
    check_backbone({**case, 'height': case['height'] % 97, 'width': case['width'] % 97})


@pytest.mark.slow  # 4 minutes
@given(images)
@thorough(300)
def test_backbone_equals_the_plain_path_for_large_images(case):
    check_backbone(case)


@given(st.integers(0, 15), st.integers(0, 600), st.booleans())
@thorough(25)
def test_backbone_rejects_images_below_one_patch(small, other, is_height):
    model = mmvil.VisionLSTM(arch=ARCH, img_size=32)
    size = (small, other) if is_height else (other, small)
    with pytest.raises(ValueError, match='patch'):
        model(torch.zeros(1, 3, *size))


@given(st.integers(0, 6).filter(lambda channels: channels != 3))
@thorough(5)
def test_backbone_rejects_other_numbers_of_channels(channels):
    model = mmvil.VisionLSTM(arch=ARCH, img_size=32)
    with pytest.raises((ValueError, RuntimeError), match=f'{channels}'):
        model(torch.zeros(1, channels, 32, 32))


# -- The cell, with gates of any size --------------------------------------------------------------

cells = st.fixed_dictionaries(
    dict(
        batch=st.integers(0, 3),
        heads=st.integers(1, 4),
        tokens=st.integers(1, 300),
        width=st.sampled_from([1, 2, 4, 16]),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        transposed=st.booleans(),
        reverse=st.booleans(),
        backend=st.sampled_from(['parallel', 'chunkwise', 'auto']),
        offset=st.floats(-30, 30),
        scale=st.floats(0, 10),
        seed=st.integers(0, 2**31),
    )
)


def check_cell(case):
    generator = torch.Generator().manual_seed(case['seed'])
    shape = case['batch'], case['heads'], case['tokens'], case['width']

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case['dtype'])

    q, k, v = (random(*shape) for _ in range(3))
    if case['transposed']:  # as a layer without copies hands them over
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    igate = random(*shape[:3]) * case['scale'] + case['offset']
    fgate = random(*shape[:3]) * case['scale'] + case['offset']
    options = dict(reverse=case['reverse'])
    output = mlstm(q, k, v, igate=igate, fgate=fgate, backend=case['backend'], **options)
    exact = [x.double() for x in (q, k, v)]
    gates = dict(igate=igate.double(), fgate=fgate.double())
    expected = mlstm(*exact, **gates, backend='reference', **options)
    assert output.shape == expected.shape and output.dtype == case['dtype']
    if not output.numel():
        return
    hypothesis.assume(expected.abs().max() < 6e4)  # float16 ends there
    computed_in = torch.float64 if case['dtype'] == torch.float64 else torch.float32
    # The logarithms of the gates are summed in float64, and their differences are exponents.
    forgotten = torch.nn.functional.logsigmoid(gates['fgate']).abs().sum(-1).amax()
    largest = forgotten + gates['igate'].abs().amax()
    relative = 20 * torch.finfo(computed_in).eps + 2e-16 * largest
    bound = relative * uncertainty(*exact, **gates, **options)
    rounding = torch.finfo(case['dtype'])  # the output is rounded, too
    bound += rounding.eps * expected.abs().clamp_min(rounding.smallest_normal)
    assert ((output.double() - expected).abs() <= bound).all()


def uncertainty(q, k, v, igate, fgate, reverse):
    """What relative errors of one in the terms of a token's sums may make of its output.

    Where a sum in the denominator cancels, its rounding errors weigh as much as its terms did.
    """
    if reverse:
        q, k, v, igate, fgate = (x.flip(2) for x in (q, k, v, igate, fgate))
    forgotten = torch.nn.functional.logsigmoid(fgate).cumsum(-1)
    exponents = forgotten[..., :, None] - forgotten[..., None, :] + igate[..., None, :]
    later = torch.ones_like(exponents, dtype=torch.bool).triu(1)
    exponents = exponents.masked_fill(later, -math.inf)
    largest = exponents.amax(-1, keepdim=True)
    weights = (exponents - largest).exp() / math.sqrt(q.shape[-1])
    terms = (weights * (q.abs() @ k.abs().mT)).sum(-1, keepdim=True)
    total = (weights * (q @ k.mT)).sum(-1, keepdim=True)
    relative = terms / (total.abs().maximum((-largest).exp()) + 1e-6)
    bound = relative * (1 + relative) * v.abs().amax(2, keepdim=True)
    return bound.flip(2) if reverse else bound


@given(cells)
@thorough(30)
def test_cell_equals_the_recurrence(case):
    check_cell({**case, 'tokens': case['tokens'] % 80 + 1})


@pytest.mark.slow  # 2 minutes
@given(cells)
@thorough(600)
def test_cell_equals_the_recurrence_for_long_sequences(case):
    check_cell(case)
