# ViL-T with Mask2Former (Cheng et al., CVPR 2022, arXiv 2112.01527) in its published size. The head
# requires mmdet.
_base_ = './upernet_vil.py'

# Trained without weight decay, for custom_keys of optim_wrapper.paramwise_cfg.
without_decay = {
    name: dict(decay_mult=0.0) for name in ('query_embed', 'query_feat', 'level_embed')
}
num_classes = 150
attention = dict(embed_dims=256, num_heads=8, batch_first=True)
model = dict(
    decode_head=dict(
        _delete_=True,
        type='Mask2FormerHead',
        in_channels=[192, 192, 192, 192],
        feat_channels=256,
        out_channels=256,
        num_classes=num_classes,
        num_queries=100,
        num_transformer_feat_level=3,
        align_corners=False,
        pixel_decoder=dict(
            type='mmdet.MSDeformAttnPixelDecoder',
            encoder=dict(
                num_layers=6,
                layer_cfg=dict(
                    self_attn_cfg=dict(num_levels=3, num_points=4, dropout=0.0, **attention),
                    ffn_cfg=dict(embed_dims=256, feedforward_channels=1024),
                ),
            ),
        ),
        transformer_decoder=dict(
            num_layers=9,
            layer_cfg=dict(
                self_attn_cfg=attention,
                cross_attn_cfg=attention,
                ffn_cfg=dict(embed_dims=256, feedforward_channels=2048),
            ),
        ),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            loss_weight=2.0,
            class_weight=[1.0] * num_classes + [0.1],
        ),
        loss_mask=dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, loss_weight=5.0),
        loss_dice=dict(type='mmdet.DiceLoss', naive_dice=True, eps=1.0, loss_weight=5.0),
        train_cfg=dict(
            num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type='mmdet.HungarianAssigner',
                match_costs=[
                    dict(type='mmdet.ClassificationCost', weight=2.0),
                    dict(type='mmdet.CrossEntropyLossCost', use_sigmoid=True, weight=5.0),
                    dict(type='mmdet.DiceCost', pred_act=True, eps=1.0, weight=5.0),
                ],
            ),
            sampler=dict(type='mmdet.MaskPseudoSampler'),
        ),
    ),
    auxiliary_head=None,
)
