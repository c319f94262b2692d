"""Law: a flow survives code of other libraries that copies, pickles or walks through all attributes of objects."""

import copy
import io
import pickle

import torch
from registry import FLOWS, TRANSFORMS, close, inputs, over


def rebuild(thing, owner=None, name=None, active=()):
    """Walk through dictionaries and attributes, and replace every tuple and list by `type(it)(its elements)`."""
    if id(thing) in active or isinstance(thing, type):
        return
    active = (*active, id(thing))
    if isinstance(thing, dict):
        for key, value in thing.items():
            rebuild(value, None, key, active)
    elif hasattr(thing, "__dict__"):
        for key, value in vars(thing).items():
            rebuild(value, thing, key, active)
    elif isinstance(thing, tuple | list):
        for value in thing:
            rebuild(value, None, None, active)
        if owner is not None:
            setattr(owner, name, type(thing)(list(thing)))


@over(FLOWS)
def test_a_distribution_is_rebuilt_and_copied(name):
    flow = FLOWS[name]()
    _, c = inputs(flow, 4)
    q = flow(c)
    z = q.rsample().detach()
    expected = q.log_prob(z)
    flow.requires_grad_(False)
    q = flow(c)
    rebuild(q)
    for copied in (q, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        close(copied.log_prob(z), expected)


@over(TRANSFORMS)
def test_a_transform_is_rebuilt_copied_and_saved(name):
    t = TRANSFORMS[name]()
    x, c = inputs(t, 4)
    y, log_det = t(x, c)
    rebuild(t)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    for copied in (t, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), torch.load(file, weights_only=False)):
        for came, expected in zip((*copied(x, c), copied.inverse(y, c)[0]), (y, log_det, x), strict=True):
            close(came, expected, 1e-7)
