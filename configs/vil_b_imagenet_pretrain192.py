# ViL-B from scratch on ImageNet-1K at 192x192, 400 epochs; vil_b_imagenet.py continues at 224x224.
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/imagenet_192.py',
    './_base_/schedules/imagenet_400e.py',
    './_base_/cls_runtime.py',
]

model = dict(
    backbone=dict(arch='base', img_size=192, drop_path_rate=0.2),
    head=dict(in_channels=1536),
)
