# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Load checkpoints through mmengine: official ones by ``mmvil://NAME``, all of them safely."""

import os
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import CheckpointLoader

from .safe_load import load_safely


def load_safely_from_now_on() -> None:
    """Let all that mmengine loads from local files and from the web go through ``load_safely``.

    ``load_from``, ``--resume``, ``init_cfg``, and OpenMMLab's inference functions.
    """

    def load_from_local(filename, map_location=None):
        return load_safely(os.path.expanduser(filename), map_location)

    def load_from_http(filename, map_location=None):
        name = os.path.basename(urlparse(filename).path)
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', name)
        if is_main_process() and not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(filename, path)
        barrier()
        return load_safely(path, map_location)

    CheckpointLoader.register_scheme('', load_from_local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), load_from_http, force=True)
