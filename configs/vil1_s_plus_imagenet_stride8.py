# ViL-S+, version 1, with patches that overlap by half: 729 tokens for 224x224. Fine-tuning after
# the stride-16 model, and evaluation. Published top-1: 82.2. Training starts from the authors'
# stride-16 checkpoint, converted (see docs/checkpoints.md):
#   --cfg-options load_from=vil_smallplus16_e400_in1k.pth
_base_ = [
    './_base_/models/vil1_classifier.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_longseq_30e.py',
    './_base_/cls_runtime.py',
]

model = dict(
    backbone=dict(arch='small_plus', stride=8, drop_path_rate=0.05),
    head=dict(in_channels=384),
)
