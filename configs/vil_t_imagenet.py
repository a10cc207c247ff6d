# ViL-T at 224x224: fine-tuning after vil_t_imagenet_pretrain192.py, and evaluation. Published
# top-1: 78.3. Fine-tuning starts from the 192x192 checkpoint, including the classifier:
#   --cfg-options load_from=work_dirs/vil_t_imagenet_pretrain192/epoch_800.pth
# The position embedding is resized.
_base_ = [
    './_base_/models/vil_classifier.py',
    './_base_/datasets/imagenet_224.py',
    './_base_/schedules/imagenet_finetune_20e.py',
    './_base_/cls_runtime.py',
]
