# ViL-T + Mask2Former on ADE20K.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = [
    './_base_/models/mask2former_vil.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/mask2former_160k.py',
    './_base_/seg_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.without_decay))
