# ViL-S + Mask2Former on ADE20K.
_base_ = './mask2former_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='mmvil://vil2_small16'),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
)
