# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Shared parts of the command lines: arguments, configs, checks, inference, one-line errors.

Importable, so that notebooks and other projects' tools can use the same checks. Errors that users
can fix raise :class:`mmvil.cli.errors.UserError`. Only :func:`mmvil.cli.main.run` makes mmengine
load checkpoints without running code in them; elsewhere, call
:func:`mmvil.checkpoints.register_safe_loaders` first.
"""
