# ViL-S, evaluated on ImageNet-Sketch; no training.
_base_ = './vil_t_imagenet_sketch.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
