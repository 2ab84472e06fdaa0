"""Image sets as tensors: digits, CIFAR-10, image folders; class subsets; batches on the device."""

from fusion.data.augmentation import Augmentation
from fusion.data.batching import batches, number_of_batches
from fusion.data.class_subset import ClassSubset
from fusion.data.drawing import few
from fusion.data.folder import image_folder
from fusion.data.image_tensors import RGB_MEAN, RGB_STD, ImageTensors
from fusion.data.joining import concat
from fusion.data.scikit_digits import digits
from fusion.data.seeds import seed_from
from fusion.data.torchvision_cifar import cifar10

__all__ = [
    "RGB_MEAN",
    "RGB_STD",
    "Augmentation",
    "ClassSubset",
    "ImageTensors",
    "batches",
    "cifar10",
    "concat",
    "digits",
    "few",
    "image_folder",
    "number_of_batches",
    "seed_from",
]
