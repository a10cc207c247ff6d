# ViL-B, version 1, with patches that overlap by half. Fine-tuning after the stride-16 model, and
# evaluation. Published top-1: 82.7. To start training, see vil1_s_plus_imagenet_stride8.py, with
# vil_base16_e400_in1k.
_base_ = './vil1_s_plus_imagenet_stride8.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    head=dict(in_channels=768),
)
