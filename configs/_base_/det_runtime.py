# Shared by all detection configs: like segmentation, except for scope, pictures and epochs.
_base_ = './seg_runtime.py'

default_scope = 'mmdet'
visualizer = dict(type='DetLocalVisualizer')
log_processor = dict(by_epoch=True)
