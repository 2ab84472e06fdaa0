"""The model card of a run, in the format of the Hugging Face hub, made from its report."""

from fusion.model_card.text import model_card
from fusion.model_card.uploading import push

__all__ = ["model_card", "push"]
