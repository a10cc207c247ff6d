# ViL-T, version 1, at 224x224: evaluation, and fine-tuning of the authors' checkpoint. Published
# top-1: 77.3.
#   python tools/test.py configs/vil1_t_imagenet.py mmvil://vil_tiny16
_base_ = [
    './_base_/models/vil1_classifier.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_finetune_20e.py',
    './_base_/cls_runtime.py',
]
