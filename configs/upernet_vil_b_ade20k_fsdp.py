# ViL-B + UperNet on ADE20K with fully sharded data parallel. Same recipe, see docs/scaling.md.
_base_ = ['./upernet_vil_b_ade20k.py', './_base_/strategies/fsdp.py']
