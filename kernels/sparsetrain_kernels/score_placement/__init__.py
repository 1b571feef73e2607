"""The scores that compete in SparseK: normalised along each document, plus a slope over positions."""

from sparsetrain_kernels.score_placement.op import document_positions, place_scores
from sparsetrain_kernels.score_placement.reference import DocumentPositions, Moments

__all__ = ["DocumentPositions", "Moments", "document_positions", "place_scores"]
