"""The model card of a run, in the format of the Hugging Face hub, made from its report."""

from fusion.card.text import model_card
from fusion.card.uploading import push

__all__ = ["model_card", "push"]
