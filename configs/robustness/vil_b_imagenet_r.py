# ViL-B, evaluated on ImageNet-R; no training.
_base_ = './vil_t_imagenet_r.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1536))
