# ViL-B, evaluated on ImageNet-A; no training.
_base_ = './vil_t_imagenet_a.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1536))
