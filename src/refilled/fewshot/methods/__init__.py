"""The few-shot methods, one file each: a function of the file's name, from a bank of images to a learner.

Its keyword-only parameters are its configuration. A file that also has a function ``meta_learner``, from a backbone
and keyword-only parameters, can be meta-trained. Every method of :mod:`refilled.methods` that trains a student is a
few-shot method besides: it trains one for each task.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from refilled import methods
from refilled.errors import MethodError, unknown
from refilled.fewshot.bank import Bank, Learner
from refilled.methods import Method
from refilled.outputs import ModelShape
from refilled.stages import FineTuning, Readout, Stage

_STUDENT = "student"  # not a method by itself, but what the methods of refilled.methods become here


class FewShotMethod(Protocol):
    """A few-shot method by name, ready to be given a bank of images."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def summary(self) -> str:
        """What it does, in a line."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters and their defaults."""

    @property
    def types(self) -> dict[str, Any]:
        """What the annotations say of its parameters."""

    def settle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the settings with the defaults; values that are text are read as what the signature asks for.

        Raises:
            MethodError: an unknown parameter, or a value that its annotation does not allow.
        """

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner.

        Raises:
            MethodError: Unknown or unsuitable settings, or a bank without the model that it needs.
        """


@dataclass(frozen=True)
class OwnMethod(Method):
    """A method that a file of this folder defines."""

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner."""
        make = cast(Callable[..., Learner], self.recipe)
        return make(bank, **self.settle(settings))


@dataclass(frozen=True)
class StudentMethod:
    """A method of :mod:`refilled.methods`, by which a student is trained for each task."""

    distillation: Method
    training: Method
    """How students are trained, by whatever method."""

    @property
    def name(self) -> str:
        """What the distillation method is called."""
        return self.distillation.name

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        return f"A student for each task: {self.distillation.summary}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the training of students, and the distillation method's own."""
        return {**self.training.parameters, **self.distillation.parameters}

    @property
    def types(self) -> dict[str, Any]:
        """What the annotations say of the parameters."""
        return {**self.training.types, **self.distillation.types}

    def settle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the settings with the defaults of both."""
        for name in settings:
            if name not in self.parameters:
                raise MethodError(f"method '{self.name}': {unknown('parameter', name, self.parameters)}")
        settled: dict[str, Any] = {}
        for method in (self.training, self.distillation):
            own = {name: value for name, value in settings.items() if name in method.parameters}
            settled.update(method.settle(own))
        return settled

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner."""
        settled = self.settle(settings)
        of_training = {name: settled[name] for name in self.training.parameters}
        of_method = {name: settled[name] for name in self.distillation.parameters}

        def stages(student: ModelShape, teacher: ModelShape | None) -> Sequence[Stage]:
            plan = self.distillation.build(student, teacher, of_method)
            if isinstance(plan, Readout | FineTuning):
                raise MethodError(f"'{self.name}' trains no student; use a few-shot method: refilled list fewshot")
            return plan

        make = cast(Callable[..., Learner], self.training.recipe)
        return make(bank, stages, **of_training)


def list_few_shot_methods() -> list[str]:
    """Name the few-shot methods: the files of this folder, and all that train students."""
    students = {name for name in methods.list_methods() if methods.load_method(name).takes_student}
    return sorted(_files() | students)


def _files() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - {_STUDENT}


def load_few_shot_method(name: str) -> FewShotMethod:
    """Find a few-shot method by its name; a file of one's own is a method that trains students.

    Raises:
        MethodError: There is no such method.
    """
    if name in _files():
        return OwnMethod(name, getattr(importlib.import_module(f"{__name__}.{name}"), name))
    if name not in list_few_shot_methods() and not name.endswith(".py"):
        raise MethodError(unknown("few-shot method", name, list_few_shot_methods()))
    training = Method(_STUDENT, importlib.import_module(f"{__name__}.{_STUDENT}").student)
    return StudentMethod(methods.load_method(name), training)


def load_meta_learner(name: str) -> Method:
    """Find the function that makes a method's learner for meta-training, from a backbone.

    Raises:
        MethodError: There is no such method, or nothing in it to meta-train.
    """
    load_few_shot_method(name)  # says so where there is none
    make = getattr(importlib.import_module(f"{__name__}.{name}"), "meta_learner", None) if name in _files() else None
    if make is None:
        raise MethodError(f"'{name}' is not meta-trained; {' and '.join(list_meta_learners())} are")
    return Method(name, make)


def list_meta_learners() -> list[str]:
    """Name the methods that are meta-trained."""
    return sorted(n for n in _files() if hasattr(importlib.import_module(f"{__name__}.{n}"), "meta_learner"))
