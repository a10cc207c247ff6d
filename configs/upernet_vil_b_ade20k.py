# ViL-B + UperNet on ADE20K. Published mIoU: 48.6 single scale, 49.6 multi-scale and flip.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = './upernet_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='mmvil://vil2_base16'),
    ),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=384),
    auxiliary_head=dict(in_channels=768, channels=384),
)
