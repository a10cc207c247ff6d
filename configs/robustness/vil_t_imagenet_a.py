# ViL-T, evaluated on ImageNet-A; no training.
_base_ = [
    '../_base_/models/vil_classifier.py',
    '../_base_/datasets/imagenet_a.py',
    '../_base_/cls_runtime.py',
]
