# ViL-B + Mask2Former on ADE20K.
_base_ = './mask2former_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='mmvil://vil2_base16'),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
)
