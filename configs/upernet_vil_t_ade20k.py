# ViL-T + UperNet on ADE20K. Published mIoU: 41.2 single scale, 43.1 multi-scale and flip.
# Training starts from the authors' ImageNet checkpoint, which is downloaded once. To start from
# another one, or from random weights:
#   --cfg-options model.backbone.init_cfg.checkpoint=vil2_tiny16_e800_in1k.th
#   --cfg-options model.backbone.init_cfg=None
_base_ = [
    './_base_/models/upernet_vil.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/seg_runtime.py',
]

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mmvil://vil2_tiny16')),
)
