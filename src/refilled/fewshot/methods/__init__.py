"""The few-shot methods, one file each: a function of the file's name, from a bank of images to a learner.

Its keyword-only parameters are its configuration. A file that also has a function ``meta_learner``, from a backbone
and keyword-only parameters, can be meta-trained. Every method of :mod:`refilled.methods` is a few-shot method
besides: it trains a student for each task.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from refilled import methods
from refilled.errors import MethodError, unknown
from refilled.fewshot.bank import Bank, Learner
from refilled.methods import Method

_STUDENT = "student"  # not a method by itself, but what the methods of refilled.methods become here


@dataclass(frozen=True)
class FewShotMethod(Method):
    """A few-shot method by name, ready to be given a bank of images."""

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner.

        Raises:
            MethodError: Unknown or unsuitable settings, or a bank without the model that it needs.
        """
        make = cast(Callable[..., Learner], self.recipe)
        return make(bank, **self.settle(settings))


@dataclass(frozen=True)
class StudentMethod(FewShotMethod):
    """A method of :mod:`refilled.methods` that trains a student for each task; it has the parameters of both."""

    distillation: Method

    @property
    def summary(self) -> str:
        """What the method does."""
        return f"A student for each task: {self.distillation.summary}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the students, and the method's own."""
        return {**super().parameters, **self.distillation.parameters}

    def settle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the settings with the defaults of both."""
        for name in settings:
            if name not in self.parameters:
                raise MethodError(f"method '{self.name}': {unknown('parameter', name, self.parameters)}")
        of_student = super().parameters
        own = {name: value for name, value in settings.items() if name in of_student}
        rest = {name: value for name, value in settings.items() if name not in own}
        return {**super().settle(own), **self.distillation.settle(rest)}

    def learner(self, bank: Bank, settings: Mapping[str, Any]) -> Learner:
        """Build the learner."""
        settled = self.settle(settings)
        own = {name: settled.pop(name) for name in super().parameters}
        make = cast(Callable[..., Learner], self.recipe)
        return make(bank, lambda student, teacher: self.distillation.stages(student, teacher, settled), **own)


def list_few_shot_methods() -> list[str]:
    """Name the few-shot methods: the files of this folder, and the methods of :mod:`refilled.methods`."""
    files = {module.name for module in pkgutil.iter_modules(__path__)} - {_STUDENT}
    return sorted(files | set(methods.list_methods()))


def load_few_shot_method(name: str) -> FewShotMethod:
    """Find a few-shot method by its name; a file of one's own is a method that trains students.

    Raises:
        MethodError: There is no such method.
    """
    if name in {module.name for module in pkgutil.iter_modules(__path__)} - {_STUDENT}:
        return FewShotMethod(name, getattr(importlib.import_module(f"{__name__}.{name}"), name))
    if name not in methods.list_methods() and not name.endswith(".py"):
        raise MethodError(unknown("few-shot method", name, list_few_shot_methods()))
    student = importlib.import_module(f"{__name__}.{_STUDENT}")
    return StudentMethod(name, student.student, methods.load_method(name))


def load_meta_learner(name: str) -> Method:
    """Find the function that makes a method's learner for meta-training, from a backbone.

    Raises:
        MethodError: There is no such method, or nothing in it to meta-train.
    """
    method = load_few_shot_method(name)
    make = getattr(importlib.import_module(method.recipe.__module__), "meta_learner", None)
    if make is None:
        raise MethodError(f"'{name}' is not meta-trained; {' and '.join(list_meta_learners())} are")
    return Method(name, make)


def list_meta_learners() -> list[str]:
    """Name the methods that are meta-trained."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(n for n in names if hasattr(importlib.import_module(f"{__name__}.{n}"), "meta_learner"))
