# ViL-B + Semantic FPN on ADE20K, a light decoder. No result has been published.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = './fpn_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='mmvil://vil2_base16'),
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
