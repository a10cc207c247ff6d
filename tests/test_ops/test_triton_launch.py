"""Launches of kernels with Triton's own compiler, for a GPU that is played."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from mmvil.ops import triton as kernels
from mmvil.ops.triton import cdiv, is_interpreted, launch, next_power_of_2, triton_problem

if triton_problem() or is_interpreted():
    pytest.skip('needs Triton as a compiler', allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction, KernelInterface  # noqa: E402

pytestmark = pytest.mark.triton

HAS_KNOBS = hasattr(triton, 'knobs')  # from Triton 3.4 on


@triton.jit(do_not_specialize=['count'])
def add_kernel(x, strides, bias, y, count, scale, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + index * strides[1], mask=index < count)
    if bias is not None:
        value += tl.load(bias)
    tl.store(y + index, value * scale, mask=index < count)


class Driver:
    """Driver of an H100 that notes launches: their kernel, stream, grid and arguments."""

    def __init__(self):
        self.launches, self.stream = [], 5
        properties = dict(max_shared_mem=227 * 1024)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 32, 0, 1024)[: 5 if HAS_KNOBS else 4],
            get_device_properties=lambda device: properties,
            unload_module=lambda module: None,
        )

    def get_current_device(self):
        return 77

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments):
            if enter_hook is not None:
                enter_hook(metadata)
            pointers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
            self.launches.append((function, stream, (x, y, z), pointers))

        return run


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    for module in ('runtime.jit', 'compiler.compiler'):
        monkeypatch.setattr(f'triton.{module}.driver', SimpleNamespace(active=driver))
    monkeypatch.setattr(kernels, 'compiled_kernels', {})
    add_kernel.device_caches.clear()
    return driver


def arguments(**changes):
    usual = dict(strides=(64, 16), x=X, bias=None, y=X, count=64, scale=0.5, SIZE=64)
    return usual | changes


X = torch.ones(1024)


VARIANTS = dict(
    usual={},
    misaligned=dict(x=torch.ones(65)[1:]),
    bfloat16=dict(y=torch.ones(64, dtype=torch.bfloat16)),
    odd_stride=dict(strides=(64, 17)),
    unit_stride=dict(strides=(64, 1)),
    wide_stride=dict(strides=(64, 2**33)),
    bias=dict(bias=torch.ones(16)),
    misaligned_bias=dict(bias=torch.ones(17)[1:]),
    constant=dict(SIZE=32),
    option=dict(num_warps=8),
)


def test_launch_uses_what_triton_compiles_for_the_same_arguments(driver):
    for _ in range(2):
        for changes in VARIANTS.values():
            launch(add_kernel, 3, **arguments(**changes))
    first, again = driver.launches[: len(VARIANTS)], driver.launches[len(VARIANTS) :]
    driver.launches.clear()
    for changes in VARIANTS.values():
        add_kernel[(3,)](**arguments(**changes), enable_fp_fusion=True)
    for ours in (first, again):
        for name, actual, expected in zip(VARIANTS, ours, driver.launches, strict=True):
            assert actual == expected, name
    assert len({function for function, *_ in first}) == len(VARIANTS)


def test_launch_binds_equal_arguments_once(driver):
    with mock.patch.object(JITFunction, 'run', autospec=True, side_effect=JITFunction.run) as run:
        for count in (64, 64, 63):
            launch(add_kernel, 2, 4, **arguments(count=count))
            launch(add_kernel, 0, **arguments())
    assert run.call_count == 2
    x = X.data_ptr()
    for (*_, grid, values), count in zip(driver.launches, (64, 64, 63), strict=True):
        assert (grid, values) == ((2, 4, 1), [x, (64, 16), None, x, count, 0.5, 64])


def test_known_launches_take_the_current_stream_and_hooks(driver, monkeypatch):
    noted = []
    for driver.stream in (5, 6):
        launch(add_kernel, 1, **arguments())
    owner = triton.knobs.runtime if HAS_KNOBS else CompiledKernel
    monkeypatch.setattr(owner, 'launch_enter_hook', lambda data: noted.append(data.get()))
    for driver.stream in (7, 5):
        launch(add_kernel, 1, **arguments())
    assert [stream for _, stream, *_ in driver.launches] == [5, 6, 7, 5]
    assert [(data['name'], data['stream']) for data in noted] == [('add_kernel', i) for i in (7, 5)]


@pytest.mark.parametrize('owner, name', [(JITFunction, 'run'), (KernelInterface, '__getitem__')])
def test_tools_intercept_known_launches(driver, owner, name):
    launch(add_kernel, 1, **arguments())
    with mock.patch.object(owner, name) as played:
        launch(add_kernel, 1, **arguments())
        launch(add_kernel, 1, **arguments())
    assert played.call_count == 2
    launch(add_kernel, 1, **arguments())
    assert len(driver.launches) == 2


def test_launch_remembers_a_limited_number(driver, monkeypatch):
    monkeypatch.setattr(kernels, 'MAX_COMPILED', 3)
    for count in range(10):
        launch(add_kernel, 1, **arguments(count=count))
        assert len(kernels.compiled_kernels) <= 3
    assert len(driver.launches) == 10


def test_rounding_agrees_with_triton():
    for n in range(1, 70):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, m) for m in (1, 7, 64)] == [triton.cdiv(n, m) for m in (1, 7, 64)]
