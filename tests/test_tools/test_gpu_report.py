"""The report about a GPU: what it concludes from measurements, and that the command works."""

import sys
from pathlib import Path

import pytest
import torch

from tests.test_tools.tool_process import call_tool

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/gpu_report.py'


@pytest.fixture(scope='module')
def gpu_report():
    pytest.importorskip('mmengine')
    sys.path.insert(0, str(TOOL.parent))
    try:
        import gpu_report

        return gpu_report
    finally:
        sys.path.remove(str(TOOL.parent))


def record(model, size, seconds, peak, ratio):
    return dict(
        model=model,
        size=size,
        batch=4,
        mode='training',
        seconds_per_image=seconds,
        time_ratio=ratio,
        peak_bytes=peak,
        saved_bytes_per_image=7e6,
    )


def test_targets_are_met_or_missed_by_the_measurements(gpu_report):
    lines = gpu_report.targets(
        [
            record('DeiT-tiny', 224, [1.0, 1.0], 100, 1.0),
            record('ViL-tiny', 224, [1.2, 1.2], 90, 1.2),
            record('ViL-tiny parallel', 224, [3.0, 6.0], 500, 4.0),
            record('DeiT-tiny', 512, [1.0, 1.0], 100, 1.0),
            record('ViL-tiny', 512, [2.0, 2.0], 101, 2.0),
        ],
        'tiny',
    )
    assert [line.split('|')[2:6] for line in lines] == [
        [' 224² ', ' training throughput / DeiT ', ' 0.83 (≥ 0.8) ', ' met '],
        [' 224² ', ' peak memory / DeiT ', ' 0.90 (≤ 1.0) ', ' met '],
        [' 224² ', ' training throughput / PyTorch parallel ', ' 3.75 (≥ 3.0) ', ' met '],
        [' 512² ', ' training throughput / DeiT ', ' 0.50 (≥ 1.0) ', ' **missed** '],
        [' 512² ', ' peak memory / DeiT ', ' 1.01 (≤ 1.0) ', ' **missed** '],
        [' 512² ', ' training throughput / PyTorch parallel ', ' - ', ' not measured '],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_report_without_a_gpu_says_so_in_one_line(tmp_path):
    said = call_tool(TOOL, '--out', tmp_path / 'report', status=2)
    assert said.startswith('error: torch sees no GPU') and len(said.splitlines()) == 1
    assert not (tmp_path / 'report').exists()


@pytest.mark.slow  # 2 minutes
def test_quick_report_on_a_cpu_has_all_parts(tmp_path):
    pytest.importorskip('mmseg')
    pytest.importorskip('timm')
    call_tool(TOOL, '--device', 'cpu', '--quick', '--out', tmp_path)
    report = (tmp_path / 'report.md').read_text()
    for part in ('No GPU', '## Targets', '## Tests\n\nPassed', 'ViL-tiny parallel', '| auto | 2 |'):
        assert part in report
