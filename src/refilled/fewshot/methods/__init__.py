"""The few-shot methods, one per file. A method is a function with the file's name, from a bank of images to a learner.

Its keyword-only parameters are its configuration. A method can be meta-trained if its file also has a function
``meta_learner``, from a backbone and keyword-only parameters. Every method of :mod:`refilled.methods` that trains a
student is also a few-shot method, which trains one student per task.
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

_STUDENT = "student"  # not a method itself; it wraps those of refilled.methods


class FewShotMethod(Protocol):
    """A few-shot method that can be applied to a bank of images."""

    @property
    def name(self) -> str:
        """Name of the method."""

    @property
    def summary(self) -> str:
        """One-line description."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Its parameters and their defaults."""

    @property
    def types(self) -> dict[str, Any]:
        """Annotated types of its parameters."""

    def settle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the settings with the defaults. Text values are converted to the annotated types.

        Raises:
            MethodError: A parameter is unknown, or its annotation does not allow the value.
        """

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner.

        Raises:
            MethodError: Settings are unknown or unsuitable, or the bank lacks the model that the method needs.
        """


@dataclass(frozen=True)
class OwnMethod(Method):
    """A method defined by a file of this folder."""

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner."""
        make = cast(Callable[..., Learner], self.function)
        return make(bank, **self.settle(settings))


@dataclass(frozen=True)
class StudentMethod:
    """A method of :mod:`refilled.methods` that trains a student for each task."""

    distillation: Method
    training: Method
    """The function that trains students with any distillation method."""

    @property
    def name(self) -> str:
        """Name of the distillation method."""
        return self.distillation.name

    @property
    def summary(self) -> str:
        """One-line description."""
        return f"A student for each task: {self.distillation.summary}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of student training and of the distillation method, with their defaults."""
        return {**self.training.parameters, **self.distillation.parameters}

    @property
    def types(self) -> dict[str, Any]:
        """Annotated types of the parameters."""
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

        make = cast(Callable[..., Learner], self.training.function)
        return make(bank, stages, **of_training)


def list_few_shot_methods() -> list[str]:
    """Return the names of the few-shot methods: the files of this folder, and all methods that train students."""
    students = {name for name in methods.list_methods() if methods.load_method(name).takes_student}
    return sorted(_files() | students)


def _files() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - {_STUDENT}


def load_few_shot_method(name: str) -> FewShotMethod:
    """Find a few-shot method by its name. The path of your own file is a method that trains students.

    Raises:
        MethodError: The method does not exist.
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
        MethodError: The method does not exist or cannot be meta-trained.
    """
    load_few_shot_method(name)  # raises if there is none
    make = getattr(importlib.import_module(f"{__name__}.{name}"), "meta_learner", None) if name in _files() else None
    if make is None:
        raise MethodError(f"'{name}' is not meta-trained; {' and '.join(list_meta_learners())} are")
    return Method(name, make)


def list_meta_learners() -> list[str]:
    """Return the names of the methods that can be meta-trained."""
    return sorted(n for n in _files() if hasattr(importlib.import_module(f"{__name__}.{n}"), "meta_learner"))
