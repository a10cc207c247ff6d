# ViL-T, evaluated on ImageNet-R; no training.
_base_ = [
    '../_base_/models/vil_classifier.py',
    '../_base_/datasets/imagenet_r.py',
    '../_base_/cls_runtime.py',
]
