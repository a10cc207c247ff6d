# ViL-T + a small Mask2Former on the demo data, from scratch on a CPU.
_base_ = [
    './_base_/models/mask2former_vil.py',
    './_base_/datasets/demo.py',
    './_base_/schedules/demo_cpu.py',
    './_base_/seg_runtime.py',
]

attention = dict(embed_dims=64)
feedforward = dict(embed_dims=64, feedforward_channels=256)
model = dict(
    data_preprocessor=dict(size=(144, 192)),
    backbone=dict(img_size=(144, 192)),
    decode_head=dict(
        feat_channels=64,
        out_channels=64,
        num_classes=10,
        num_queries=32,
        positional_encoding=dict(num_feats=32),
        pixel_decoder=dict(
            positional_encoding=dict(num_feats=32),
            encoder=dict(
                num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=feedforward)
            ),
        ),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=feedforward),
        ),
        loss_cls=dict(class_weight=[1.0] * 10 + [0.1]),
        train_cfg=dict(num_points=2048),
    ),
    test_cfg=dict(mode='whole', _delete_=True),
)

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.without_decay))
