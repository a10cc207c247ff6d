# ViL-T+, version 1, at 224x224: see vil1_t_imagenet.py. The authors' checkpoint is
# mmvil://vil_tinyplus16. Published top-1: 78.1.
_base_ = './vil1_t_imagenet.py'

model = dict(backbone=dict(arch='tiny_plus'))
