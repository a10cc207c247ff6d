# ViL-S + Semantic FPN on ADE20K, a light decoder. No result has been published.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = './fpn_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='mmvil://vil2_small16'),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
