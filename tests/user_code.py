"""Code as users write it, for type checkers: see test_types.py. It is not run."""

from typing import assert_type

import torch
from torch import Tensor

import counterflow as cf


def use() -> None:
    flow = cf.MAF(features=3, context=2, layers=2, hidden=(16,))
    c = torch.randn(5, 2)
    q = flow(c)
    assert_type(q, cf.flows.flow.FlowDistribution)
    assert_type(flow(context=c), cf.flows.flow.FlowDistribution)
    draws, log_q = q.rsample_and_log_prob((7,))
    assert_type((draws, log_q), tuple[Tensor, Tensor])
    assert_type(q.log_prob(draws), Tensor)

    y, log_det = flow.transform(draws, c)
    assert_type(log_det, Tensor)
    x, _ = flow.transform.inverse(y, c)
    assert_type(x, Tensor)

    history = cf.fit(flow, cf.log_likelihood, (draws, c), (draws, c), cf.FitConfig(epochs=1))
    assert_type(len(history.epochs), int)
    again = cf.load("flow.safetensors", kind=cf.Flow)
    assert_type(again, cf.Flow)
    density = cf.FlowDensity(epochs=3).fit(draws.numpy())
    assert_type(density, cf.FlowDensity)
