_base_ = '../_base_/vtab1k.py'
model = dict(head=dict(num_classes=4))
