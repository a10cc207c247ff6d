# ViL-S from scratch on ImageNet-1K at 192x192, 400 epochs; vil_s_imagenet.py continues at 224x224.
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/imagenet_192.py',
    './_base_/schedules/imagenet_400e.py',
    './_base_/cls_runtime.py',
]

model = dict(
    backbone=dict(arch='small', img_size=192, drop_path_rate=0.05),
    head=dict(in_channels=768),
)
