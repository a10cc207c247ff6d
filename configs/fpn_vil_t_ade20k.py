# ViL-T + Semantic FPN on ADE20K, a light decoder. No result has been published.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = [
    './_base_/models/fpn_vil.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_80k_fpn.py',
    './_base_/seg_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
)
