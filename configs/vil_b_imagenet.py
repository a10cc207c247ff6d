# ViL-B at 224x224: fine-tuning after vil_b_imagenet_pretrain192.py, and evaluation. Published
# top-1: 82.4. To start from the 192x192 checkpoint, see vil_t_imagenet.py.
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_finetune_5e.py',
    './_base_/cls_runtime.py',
]

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    head=dict(in_channels=1536),
)
