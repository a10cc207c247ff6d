# ViL-T, evaluated on ImageNet-Sketch; no training.
_base_ = [
    '../_base_/models/vil_classifier.py',
    '../_base_/datasets/imagenet_sketch.py',
    '../_base_/cls_runtime.py',
]
