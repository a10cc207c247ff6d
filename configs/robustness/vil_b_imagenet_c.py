# ViL-B, evaluated on ImageNet-C; no training.
_base_ = './vil_t_imagenet_c.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1536))
