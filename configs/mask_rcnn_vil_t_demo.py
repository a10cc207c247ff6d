# ViL-T + a small Mask R-CNN on the demo data, from scratch on a CPU.
_base_ = [
    './_base_/models/mask_rcnn_vil.py',
    './_base_/datasets/demo_coco.py',
    './_base_/schedules/demo_cpu.py',
    './_base_/det_runtime.py',
]

model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(img_size=(144, 192), pyramid=dict(out_channels=64)),
    neck=dict(in_channels=[64] * 5, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, conv_out_channels=64, fc_out_channels=256, num_classes=6),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=6),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=False, begin=50, end=500),
]
train_cfg = dict(max_iters=500, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=250), visualization=dict(type='DetVisualizationHook'))
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(base_batch_size=4)
