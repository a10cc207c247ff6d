# ViL-S + Mask R-CNN on COCO, 12 epochs.
_base_ = './mask_rcnn_vil_t_coco.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint='mmvil://vil2_small16'),
    ),
)
