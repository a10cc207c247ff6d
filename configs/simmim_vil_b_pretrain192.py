# ViL-B pre-trained on unlabelled images at 192x192 with SimMIM, 100 epochs.
_base_ = './_base_/simmim_192.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=768))
