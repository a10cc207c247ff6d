# ViL-T, version 1 (first version of the paper), as an ImageNet classifier: mean of first and last
# token.
_base_ = './vil_classifier.py'

model = dict(
    backbone=dict(version=1, out_type='bilateral_avg'),
    head=dict(in_channels=192),
)
