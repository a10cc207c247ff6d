# ViL-T + UperNet on CamVid, from scratch, small enough for a CPU.
_base_ = [
    './_base_/models/upernet_vil.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/camvid_cpu.py',
    './_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(192, 256)),
    backbone=dict(img_size=(192, 256)),
    decode_head=dict(num_classes=11, channels=64),
    auxiliary_head=dict(num_classes=11, channels=64),
    test_cfg=dict(mode='whole', _delete_=True),
)
