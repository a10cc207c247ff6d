# ViL-B, version 1, at 224x224: see vil1_t_imagenet.py. The authors' checkpoint is
# mmvil://vil_base16. Published top-1: 81.6.
_base_ = './vil1_t_imagenet.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    head=dict(in_channels=768),
)
