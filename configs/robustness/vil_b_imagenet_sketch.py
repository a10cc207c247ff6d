# ViL-B, evaluated on ImageNet-Sketch; no training.
_base_ = './vil_t_imagenet_sketch.py'

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1536))
