# ViL-S, evaluated on ImageNet-R; no training.
_base_ = './vil_t_imagenet_r.py'

model = dict(backbone=dict(arch='small'), head=dict(in_channels=768))
