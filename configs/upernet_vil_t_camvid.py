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
    # Whole images have 3.6 times the tokens of a crop, which costs 6 points of mIoU.
    test_cfg=dict(crop_size=(192, 256), stride=(84, 112)),
)
