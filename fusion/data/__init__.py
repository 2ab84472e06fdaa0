"""Image sets in memory and streamed: digits, CIFAR-10, folders; subsets and views; batches."""

from fusion.data.augmentation import Augmentation
from fusion.data.batching import batches, number_of_batches
from fusion.data.class_subset import ClassSubset
from fusion.data.domains import blurred, faded, greyed, inverted, noisy, rotated
from fusion.data.drawing import few
from fusion.data.folder import image_folder
from fusion.data.glyphs import glyphs
from fusion.data.image_files import ImageFiles
from fusion.data.image_tensors import ImageTensors
from fusion.data.joining import concat
from fusion.data.labelled_images import RGB_MEAN, RGB_STD, LabelledImages
from fusion.data.labels import class_names_of, label_space, labels_of
from fusion.data.preprocessing import Preprocessing, preprocessing_of
from fusion.data.scikit_digits import digits
from fusion.data.seeds import seed_from
from fusion.data.shapes import as_rgb, renormalised, resized
from fusion.data.tasks import grouped, quarter_turns
from fusion.data.torchvision_cifar import cifar10
from fusion.data.view import ImageView

__all__ = [
    "RGB_MEAN",
    "RGB_STD",
    "Augmentation",
    "ClassSubset",
    "ImageFiles",
    "ImageTensors",
    "ImageView",
    "LabelledImages",
    "Preprocessing",
    "as_rgb",
    "batches",
    "blurred",
    "cifar10",
    "class_names_of",
    "concat",
    "digits",
    "faded",
    "few",
    "glyphs",
    "greyed",
    "grouped",
    "image_folder",
    "inverted",
    "label_space",
    "labels_of",
    "noisy",
    "number_of_batches",
    "preprocessing_of",
    "quarter_turns",
    "renormalised",
    "resized",
    "rotated",
    "seed_from",
]
