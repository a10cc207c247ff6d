# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
"""Shared parts of the command lines: arguments, configs, preflight checks, one-line errors.

Importable, so that notebooks and tools of other projects get the same protections.
"""
