# ViL-T + Semantic FPN on CamVid, from scratch: a lighter decoder than in upernet_vil_t_camvid.py.
_base_ = [
    './_base_/models/fpn_vil.py',
    './_base_/datasets/camvid.py',
    './_base_/schedules/camvid_cpu.py',
    './_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(192, 256)),
    backbone=dict(img_size=(192, 256)),
    neck=dict(out_channels=64),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, num_classes=11),
    test_cfg=dict(crop_size=(192, 256), stride=(84, 112)),
)
