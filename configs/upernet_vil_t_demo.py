# ViL-T + UperNet on the demo data, from scratch on a CPU.
_base_ = [
    './_base_/models/upernet_vil.py',
    './_base_/datasets/demo.py',
    './_base_/schedules/demo_cpu.py',
    './_base_/seg_runtime.py',
]

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(144, 192)),
    backbone=dict(
        img_size=(144, 192),
        pyramid=dict(norm_cfg=norm_cfg),
    ),
    decode_head=dict(num_classes=10, channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=10, channels=64, norm_cfg=norm_cfg),
    test_cfg=dict(mode='whole', _delete_=True),
)
