# Copyright (c) mmvil contributors. Licensed under the Apache License 2.0.
import pytest
import torch

from mmvil.checkpoints import describe_misfit

WANTED = {
    'a': torch.zeros(2, 3),
    'b': torch.zeros(4),
    'backbone.pos_embed': torch.zeros(1, 4, 4, 8),
}


@pytest.mark.parametrize(
    'change, expected',
    [
        ({}, ''),
        (dict(a=None, b=None), '2 of 3 tensors are missing (a, b)'),
        (
            dict(a=torch.zeros(6)),
            '1 of 3 tensors have another shape (a: (6,) in the file, (2, 3) in the model)',
        ),
        ({'backbone.pos_embed': torch.zeros(1, 9, 5, 8)}, ''),  # the backbone resizes it
        (
            {'a': None, 'backbone.pos_embed': torch.zeros(1, 4, 4, 9)},
            '1 of 3 tensors are missing (a) and 1 of 3 tensors have another shape '
            '(backbone.pos_embed: (1, 4, 4, 9) in the file, (1, 4, 4, 8) in the model)',
        ),
        ({'backbone.pos_embed': torch.zeros(1, 17, 8)}, '1 of 3 tensors have another shape '),
        (dict(extra=torch.zeros(1)), ''),
    ],
)
def test_describe_misfit_lists_missing_and_misshapen_tensors(change, expected):
    state = {name: x for name, x in {**WANTED, **change}.items() if x is not None}
    said = describe_misfit(state, WANTED)
    assert said.startswith(expected) and bool(said) == bool(expected)


def test_describe_misfit_counts_what_it_does_not_name():
    wanted = {f'layers.{i}': torch.zeros(1) for i in range(6)}
    assert describe_misfit({}, wanted, limit=2).endswith('(layers.0, layers.1 and 4 more)')
    assert describe_misfit({}, wanted, limit=None).endswith('layers.4, layers.5)')


def test_describe_misfit_names_what_there_is_if_nothing_fits():
    state = {f'model.{name}': x for name, x in WANTED.items()}
    said = '; instead, there are model.a, model.b, model.backbone.pos_embed'
    assert describe_misfit(state, WANTED).endswith(said)


def test_describe_misfit_distinguishes_optional_and_unknown_tensors():
    state = {**WANTED, 'c': torch.zeros(1)}
    del state['b']
    assert describe_misfit(state, WANTED, optional=['b']) == ''
    said = describe_misfit(state, WANTED, optional=['b'], strict=True)
    assert said == '1 are unknown (c)'
