# ViL-T from scratch on ImageNet-1K at 192x192, 800 epochs; vil_t_imagenet.py continues at 224x224.
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/imagenet_192.py',
    './_base_/schedules/imagenet_800e.py',
    './_base_/cls_runtime.py',
]

model = dict(backbone=dict(img_size=192))
