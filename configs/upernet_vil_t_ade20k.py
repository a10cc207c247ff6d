# ViL-T + UperNet on ADE20K. Published mIoU: 41.2 single scale, 43.1 multi-scale and flip.
#
# The published result starts from a ViL-T trained on ImageNet. Name its checkpoint with
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=vil_t_imagenet.pth
# and the position embedding is resized to 512x512. Without it, training starts from scratch.
_base_ = [
    './_base_/models/upernet_vil.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/ade20k_160k.py',
    './_base_/seg_runtime.py',
]
