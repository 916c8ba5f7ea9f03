"""Teachers and students: architectures by name, models in folders, and teachers from other libraries and files."""

from refilled.models.architectures import create_model, describe, from_description, list_models
from refilled.models.backbone import Backbone, freeze, trainable_copy
from refilled.models.embedded import embedded_folder
from refilled.models.folder import load_model, save_model
from refilled.models.licence import licence_of
from refilled.models.multiplications import multiplications_of
from refilled.models.probe import PROBE_IMAGES, probe, refuse_non_finite
from refilled.models.teacher import load_teacher
from refilled.models.user_student import trust_user_file
from refilled.models.warm_start import classes_of_folder, create_student, starts_from_weights
from refilled.models.weights import open_weights, read_weights

__all__ = [
    "PROBE_IMAGES",
    "Backbone",
    "classes_of_folder",
    "create_model",
    "create_student",
    "describe",
    "embedded_folder",
    "freeze",
    "from_description",
    "licence_of",
    "list_models",
    "load_model",
    "load_teacher",
    "multiplications_of",
    "open_weights",
    "probe",
    "read_weights",
    "refuse_non_finite",
    "save_model",
    "starts_from_weights",
    "trainable_copy",
    "trust_user_file",
]
