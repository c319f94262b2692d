"""Export of a flow's one-pass direction, or of a part of a VAE, to ONNX or to an archive of torch.export."""

from counterflow.io.export.files import export, largest_difference
from counterflow.io.export.graphs import OUTPUTS, Direction, graph_of

__all__ = ["OUTPUTS", "Direction", "export", "graph_of", "largest_difference"]
