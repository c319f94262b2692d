"""Functions of tensors as CUDA graphs: captured once for each shape, replayed in one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]

MAX_GRAPHS = 16  # each keeps the buffers of its solve


def capture(run: Run, tensors: Sequence[Tensor]) -> Run:
    """Return a function that copies its arguments to where a CUDA graph of `run` reads them, and replays the graph."""
    static = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces in a first run
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(static)

    def replay(tensors: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(static, list(tensors))
        graph.replay()
        return [output.clone(memory_format=torch.contiguous_format) for output in outputs]

    return replay


class Graphs:
    """Graphs by the shape of their arguments; a shape is captured when it comes a second time.

    A shape that cannot be captured is run as it is from then on. The graph that was not used for longest makes room.

    Args:
        capture: makes a graph; see `capture`.
    """

    def __init__(self, capture: Callable[[Run, Sequence[Tensor]], Run] = capture) -> None:
        self._capture = capture
        self._graphs: OrderedDict[Hashable, Run | None] = OrderedDict()
        self._lock = Lock()  # two threads must not fill the buffers of one graph

    def __call__(self, name: Hashable, run: Run, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return run(tensors); `name` says what else the result depends on."""
        key = (name, *((t.shape, t.dtype, t.device) for t in tensors))
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = None
                while len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                return run(tensors)
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            if graph is None:
                try:
                    graph = self._capture(run, tensors)
                except RuntimeError:  # an operation that a graph cannot hold, or too little memory for its buffers
                    graph = run
                self._graphs[key] = graph
            return graph(tensors)
