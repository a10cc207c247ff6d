# ViL-S at 224x224: fine-tuning after vil_s_imagenet_pretrain192.py, and evaluation. Published
# top-1: 81.5. To start from the 192x192 checkpoint, see vil_t_imagenet.py.
_base_ = './vil_t_imagenet.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.05),
    head=dict(in_channels=768),
)
