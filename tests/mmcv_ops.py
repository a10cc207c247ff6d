# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Stand-in for compiled operators of mmcv, computed by torchvision.

onedl-mmcv installs without operators, and mmdet cannot be imported without them. Importing this
module puts the stand-in in place if mmdet is installed and mmcv has none. It can run a tool, too:

python -m tests.mmcv_ops tools/train.py configs/mask_rcnn_vil_t_demo.py
"""

import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch


class Operators(ModuleType):
    """What Mask R-CNN and Mask2Former need on a CPU; the other names fail when they are called."""

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        assert offset == 0, 'torchvision has no offset'
        return torch.ops.torchvision.nms(boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(x, rois, out, argmax_y, argmax_x, **options):
        out.copy_(torch.ops.torchvision.roi_align(x, rois, *roi_options(**options)))

    @staticmethod
    def roi_align_backward(grad, rois, argmax_y, argmax_x, grad_x, **options):
        scale, height, width, *sampling = roi_options(**options)
        backward = torch.ops.torchvision._roi_align_backward
        grad_x.copy_(backward(grad, rois, scale, height, width, *grad_x.shape, *sampling))

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args, **kwargs):
            raise NotImplementedError(f'{name} needs mmcv with compiled operators')

        return operator


def roi_options(aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned):
    assert pool_mode == 1, 'torchvision averages only'
    return spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned


if find_spec('mmdet') and 'mmcv._ext' not in sys.modules and not find_spec('mmcv._ext'):
    import torchvision  # noqa: F401, registers its operators

    sys.modules['mmcv._ext'] = Operators('mmcv._ext')
    sys.modules['mmcv._ext'].__spec__ = ModuleSpec('mmcv._ext', loader=None)

if __name__ == '__main__':
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
