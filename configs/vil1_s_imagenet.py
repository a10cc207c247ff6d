# ViL-S, version 1, at 224x224: see vil1_t_imagenet.py. The authors' checkpoint is
# mmvil://vil_small16. Published top-1: 80.7.
_base_ = './vil1_t_imagenet.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.05),
    head=dict(in_channels=384),
)
