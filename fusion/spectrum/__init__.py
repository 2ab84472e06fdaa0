"""Signal and noise in weights: the random-matrix noise model and the score built on it."""

from __future__ import annotations

from fusion.spectrum.notebook import notebook_score
from fusion.spectrum.snr import LayerSNR, as_matrix, layer_snr

__all__ = ["LayerSNR", "as_matrix", "layer_snr", "notebook_score"]
