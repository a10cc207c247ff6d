# ViL-S, evaluated on ImageNet-C; no training.
_base_ = './vil_t_imagenet_c.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
