# ViL-T + Mask R-CNN on COCO, 12 epochs.
# For the initial weights, see upernet_vil_t_ade20k.py.
_base_ = [
    './_base_/models/mask_rcnn_vil.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/coco_1x.py',
    './_base_/det_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
)
