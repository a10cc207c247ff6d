# ViL-T, evaluated on ImageNet-C; no training.
_base_ = [
    '../_base_/models/vil_classifier.py',
    '../_base_/datasets/imagenet_c.py',
    '../_base_/cls_runtime.py',
]
