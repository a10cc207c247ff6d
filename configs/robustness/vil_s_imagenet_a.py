# ViL-S, evaluated on ImageNet-A; no training.
_base_ = './vil_t_imagenet_a.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
