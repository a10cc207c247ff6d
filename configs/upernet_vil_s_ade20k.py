# ViL-S + UperNet on ADE20K. Published mIoU: 46.3 single scale, 47.9 multi-scale and flip.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = './upernet_vil_t_ade20k.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='mmvil://vil2_small16'),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384, channels=384),
)
