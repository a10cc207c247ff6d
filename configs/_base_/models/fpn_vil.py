# ViL-T with Semantic FPN (Panoptic Feature Pyramid Networks, arXiv 1901.02446): neck and head of
# mmseg on the pyramid of upernet_vil.py, without an auxiliary head.
_base_ = './upernet_vil.py'

norm_cfg = dict(type='SyncBN', requires_grad=True)

model = dict(
    neck=dict(type='FPN', in_channels=[192, 192, 192, 192], out_channels=256, num_outs=4),
    decode_head=dict(
        _delete_=True,
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='mmvil.engine.GlobalBatchCrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=None,
)
