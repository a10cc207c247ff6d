# ViL-T pre-trained on unlabelled images at 192x192 with SimMIM, 100 epochs.
_base_ = './_base_/simmim_192.py'
