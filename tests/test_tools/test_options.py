# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import sys
from pathlib import Path

import pytest

from mmvil.cli.errors import UserError
from mmvil.cli.main import parse_args

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import test as test_tool  # noqa: E402
import train as train_tool  # noqa: E402


def read(tool, make_parser, *arguments, config='vil_t_imagenet'):  # trains in bfloat16
    path = ROOT / 'configs' / f'{config}.py'
    return tool.read_config(parse_args(make_parser(), [str(path), *arguments]))


@pytest.mark.parametrize(
    'arguments, dtype',
    [
        ([], 'bfloat16'),
        (['--amp'], 'bfloat16'),
        (['--precision', 'bfloat16'], 'bfloat16'),
        (['--precision', 'float16'], 'float16'),
        (['--precision', 'float32', '--cfg-options', 'optim_wrapper.use_fsdp=True'], None),
    ],
)
def test_train_uses_the_given_precision(arguments, dtype):
    wrapper = read(train_tool, train_tool.make_train_parser, *arguments).optim_wrapper
    assert wrapper.get('dtype') == dtype
    assert ('Amp' in wrapper.type) == (dtype is not None) and 'use_fsdp' not in wrapper


@pytest.mark.parametrize(
    'arguments, half',
    [([], False), (['--precision', 'bfloat16'], True), (['--amp'], True)],
)
def test_test_uses_the_given_precision(monkeypatch, arguments, half):
    asked = []
    monkeypatch.setattr(test_tool.torch, 'set_autocast_gpu_dtype', asked.append)
    cfg = read(test_tool, test_tool.make_test_parser, 'checkpoint.pth', *arguments)
    assert cfg.test_cfg.get('fp16', False) is half
    dtype = test_tool.torch.bfloat16 if '--precision' in arguments else test_tool.torch.float16
    assert asked == [dtype] * half


# -- Other options of test.py ----------------------------------------------------------------------


def test_tta_flips_in_each_of_several_datasets():
    options = ('checkpoint.pth', '--tta')
    imagenet_c = 'robustness/vil_t_imagenet_c'
    cfg = read(test_tool, test_tool.make_test_parser, *options, config=imagenet_c)
    datasets = cfg.test_dataloader.dataset.datasets
    assert len(datasets) == 75
    assert all(dataset.pipeline[-1].type == 'TestTimeAug' for dataset in datasets)
    assert cfg.model.type == 'mmpretrain.AverageClsScoreTTA'


def test_tta_loads_images_and_masks_like_the_test_pipeline():
    test_pipeline = 'test_dataloader.dataset.pipeline'
    options = [
        f'{test_pipeline}.0.imdecode_backend=tifffile',
        f"{test_pipeline}.2={{'type':'LoadMappedAnnotations','values':[0,255]}}",
    ]
    arguments = ('a.pth', '--tta', '--cfg-options', *options)
    segmentor = dict(config='upernet_vil_t_ade20k')
    cfg = read(test_tool, test_tool.make_test_parser, *arguments, **segmentor)
    load, augment = cfg.test_dataloader.dataset.pipeline
    assert load.imdecode_backend == 'tifffile'
    (masks,) = augment.transforms[2]
    assert masks == dict(type='LoadMappedAnnotations', values=[0, 255])
    assert cfg.tta_pipeline[1].transforms[2][0].type == 'LoadAnnotations'


def test_metrics_of_any_model_go_to_a_file_of_a_known_kind():
    options = ('checkpoint.pth', '--out-item', 'metrics', '--out')
    segmentor = dict(config='upernet_vil_t_camvid')
    cfg = read(test_tool, test_tool.make_test_parser, *options, 'out.json', **segmentor)
    assert [evaluator.type for evaluator in cfg.test_evaluator] == ['IoUMetric']
    assert 'output_dir' not in cfg.test_evaluator[0]
    with pytest.raises(UserError, match='metrics are written to a .json file, but out.txt'):
        read(test_tool, test_tool.make_test_parser, *options, 'out.txt', **segmentor)


def test_test_does_not_overwrite_the_config_of_the_training():
    for config in ('vil_t_imagenet', 'upernet_vil_t_ade20k'):
        cfg = read(test_tool, test_tool.make_test_parser, 'a.pth', '--tta', config=config)
        assert Path(cfg.filename).name == f'{config}_test.py'  # the name under which it is dumped
        assert cfg.work_dir == f'work_dirs/{config}'


def test_label_maps_are_not_written_to_a_file(tmp_path):
    (tmp_path / 'out.json').touch()
    options = ('a.pth', '--out', str(tmp_path / 'out.json'))
    with pytest.raises(UserError, match='written to a folder, but .*out.json is a file'):
        read(test_tool, test_tool.make_test_parser, *options, config='upernet_vil_t_camvid')


def test_label_maps_of_the_same_name_are_rejected_before_the_test():
    class Images(list):
        def get_data_info(self, index):
            return dict(img_path=self[index])

    test_tool.check_names(Images(['a/0.jpg', 'a/1.jpg']))
    with pytest.raises(UserError, match=r'write 2 label maps to 0\.png'):
        test_tool.check_names(Images(['a/0.jpg', 'a/1.jpg', 'b/0.jpg']))


def test_config_without_what_a_run_needs_is_rejected():
    imagenet_a, vtab = dict(config='robustness/vil_t_imagenet_a'), dict(config='vtab1k/cifar')
    with pytest.raises(UserError, match='has no train_dataloader, train_cfg, optim_wrapper, which'):
        read(train_tool, train_tool.make_train_parser, '--amp', **imagenet_a)
    with pytest.raises(UserError, match='has no test_dataloader, test_evaluator, test_cfg, which'):
        read(test_tool, test_tool.make_test_parser, 'checkpoint.pth', **vtab)


@pytest.mark.parametrize('option', ['--out', '--show-dir', '--dump', '--out-item=metrics --out'])
def test_outputs_that_could_not_be_written_are_rejected_before_the_test(tmp_path, option):
    (tmp_path / 'file').touch()
    segmentor = dict(config='upernet_vil_t_camvid')
    name = 'pictures' if option in ('--out', '--show-dir') else 'metrics.pkl'
    options = ('a.pth', *option.split(), str(tmp_path / 'file/more' / name))
    with pytest.raises(UserError, match='cannot use the folder .*/file: it is a file'):
        read(test_tool, test_tool.make_test_parser, *options, **segmentor)


@pytest.mark.parametrize('option', ['default_hooks=None', 'default_hooks.visualization=None'])
def test_config_without_hooks_draws_no_pictures(option):
    hooks = ('--cfg-options', option)
    with pytest.raises(UserError, match='need default_hooks.visualization'):
        read(test_tool, test_tool.make_test_parser, 'a.pth', '--show', *hooks)
    read(test_tool, test_tool.make_test_parser, 'a.pth', '--tta', *hooks)


def test_metrics_need_a_file():
    with pytest.raises(UserError, match='--out-item metrics needs a file'):
        read(test_tool, test_tool.make_test_parser, 'a.pth', '--out-item', 'metrics')


def test_batch_size_of_the_learning_rate_is_asked_for():
    options = ('--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None')
    with pytest.raises(UserError, match='--auto-scale-lr needs the batch size'):
        read(train_tool, train_tool.make_train_parser, *options)
