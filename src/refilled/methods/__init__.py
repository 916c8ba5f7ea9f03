"""The methods, one file each: the formula, the loss, and the function that defines the stages.

The function maps the student, the teacher and keyword-only parameters to a list of stages, or to another
:data:`~refilled.stages.Plan`. The file name is the name of the method, the signature its configuration, and the
docstring its citation. To add a method, add a file.
"""

import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from refilled.errors import MethodError, RefilledError, unknown
from refilled.losses.feature_maps import check_feature_maps
from refilled.outputs import ModelShape
from refilled.ranges import AMOUNT, POSITIVE, SHARE, WHOLE, Range
from refilled.stages import FineTuning, Plan, Readout, Stage, of_several

MethodFunction = Callable[..., Plan]
"""``function(student, teacher, *, ...)``, as a method's file defines it."""

_RANGES = {
    **dict.fromkeys(("alpha", "beta", "gamma", "kd_decay", "tune_rate"), AMOUNT),
    **dict.fromkeys(("temperature", "kd_temperature", "margin", "C"), POSITIVE),
    **dict.fromkeys(("embedding_share", "distil_share", "threshold"), SHARE),
    **dict.fromkeys(("warmup_epochs", "start", "rise", "kd_refine"), WHOLE),
    **dict.fromkeys(("kd_doubt", "trust"), AMOUNT),
    "worth": Range(0, 10**12, above=True),  # a large one stands for a teacher that is never outgrown
}
"""Ranges of the parameters of this package's methods; a parameter has the same range in all. Weights are amounts."""


@dataclass(frozen=True)
class Method:
    """A method: its name and its function."""

    name: str
    function: MethodFunction

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's own parameters and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @property
    def types(self) -> dict[str, Any]:
        """The annotations of the method's own parameters; without one, the type of the default."""
        hints = get_type_hints(self.function)
        return {name: hints.get(name, type(default)) for name, default in self.parameters.items()}

    def settle(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the settings with the defaults, and convert text values to the types of the signature.

        Raises:
            MethodError: A parameter is unknown, or its annotation does not allow the value.
        """
        types = self.types
        for name in settings:
            if name not in self.parameters:
                raise MethodError(f"method '{self.name}': {unknown('parameter', name, self.parameters)}")
        given = {name: _read(value, types[name], f"{self.name}.{name}") for name, value in settings.items()}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise MethodError(f"{self.name}.{name} must be a finite number, but is {value}")
            allowed = self._range(name)
            if allowed is not None and isinstance(value, int | float) and value not in allowed:
                raise MethodError(f"{self.name}.{name} = {value} is out of range; {allowed.advice(value)}")
        return {**self.parameters, **given}

    @property
    def _is_of_the_package(self) -> bool:
        return self.function.__module__.startswith(f"{__name__}.")

    def _range(self, name: str) -> Range | None:
        """Return the range of a parameter that no loss checks. A method in a file of the user has its own rules."""
        if not self._is_of_the_package:
            return None
        return AMOUNT if name.endswith("weight") else _RANGES.get(name)

    @property
    def takes_student(self) -> bool:
        """Whether the method trains a student. A method that does not annotates ``student`` as None."""
        return get_type_hints(self.function).get("student") is not NoneType

    @property
    def takes_teacher(self) -> bool:
        """Whether the annotation of ``teacher`` requires a teacher."""
        hint = get_type_hints(self.function).get("teacher")
        return hint not in (None, NoneType) and NoneType not in get_args(hint)

    @property
    def ignores_teacher(self) -> bool:
        """Whether the method never uses a teacher. Such a method annotates ``teacher`` as None."""
        return get_type_hints(self.function).get("teacher") is NoneType

    def check_named(self, teachers: Sequence[str]) -> None:
        """Check by the names alone, before anything is loaded, that there is a teacher if the method needs one.

        Raises:
            MethodError: There is none.
        """
        if self.takes_teacher and not teachers:
            raise self._no_teacher()

    def build(self, student: ModelShape | None, teacher: ModelShape | None, settings: Mapping[str, Any]) -> Plan:
        """Build the stages or another plan, after all checks that are possible before training.

        Raises:
            MethodError: Settings are unknown or unsuitable; a required student or teacher is missing; a loss compares
                logits, but teacher and student have different classes; or a loss compares feature maps, but one of
                the two models has none.
        """
        settings = self.settle(settings)
        if student is None and self.takes_student:
            raise self._no_student()
        if teacher is None and self.takes_teacher:
            raise self._no_teacher()
        plan = self._call(student, teacher, settings)
        if isinstance(plan, Readout | FineTuning):
            if teacher is None:
                raise self._no_teacher()
            return plan
        if not isinstance(plan, Sequence) or not plan or not all(isinstance(stage, Stage) for stage in plan):
            raise MethodError(f"method '{self.name}' must return a list of one or more stages, but returned {plan!r}")
        stages = list(plan)
        if student is None:
            raise self._no_student()
        if teacher is None and any(stage.needs_teacher for stage in stages):
            raise self._no_teacher()
        if teacher is not None and any(stage.reads("logits") for stage in stages):
            self._check_label_spaces(student, teacher)
        if teacher is not None and any(stage.reads("features") for stage in stages):
            check_feature_maps(student, teacher)
        return stages

    def _call(self, student: ModelShape | None, teacher: ModelShape | None, settings: Mapping[str, Any]) -> Plan:
        try:
            return self.function(student, teacher, **settings)
        except RefilledError:
            raise
        except (Exception, SystemExit) as error:
            file = self.function.__code__.co_filename if hasattr(self.function, "__code__") else ""
            lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
            if self._is_of_the_package or not lines:
                raise
            raise MethodError(f"{file}:{lines[-1]}: {type(error).__name__}: {error}") from error

    def build_for(
        self, student: ModelShape | None, teachers: Mapping[int, ModelShape], settings: Mapping[str, Any]
    ) -> Plan:
        """Build the plan with any number of teachers, each with its number; see :func:`~refilled.stages.of_several`.

        Raises:
            MethodError: As :meth:`build`, or there are several teachers and the method takes only one.
        """
        if not teachers:
            return self.build(student, None, settings)
        plans: dict[int, Sequence[Stage]] = {}
        for number, teacher in teachers.items():
            try:
                plan = self.build(student, teacher, settings)
            except MethodError as error:
                raise MethodError(f"teacher {number + 1}: {error}" if len(teachers) > 1 else str(error)) from error
            if isinstance(plan, Readout | FineTuning):
                if len(teachers) == 1:
                    return plan
                raise MethodError(
                    f"'{self.name}' works in the network of one teacher, but {len(teachers)} are named; name one "
                    "--teacher, or take a method that trains a student by its terms, such as refilled or regression"
                )
            plans[number] = plan
        return of_several(plans)

    def _no_teacher(self) -> MethodError:
        return MethodError(f"'{self.name}' learns from a teacher; name one with --teacher, or use vanilla")

    def _no_student(self) -> MethodError:
        return MethodError(f"'{self.name}' trains a student; name one with --student")

    def _check_label_spaces(self, student: ModelShape, teacher: ModelShape) -> None:
        if teacher.class_names is None:
            raise MethodError(
                f"'{self.name}' compares logits class by class, but the classes of the teacher are not known; "
                "use refilled or rkd"
            )
        if teacher.class_names != student.class_names:
            mine = student.class_names or ()
            shared = len(set(mine) & set(teacher.class_names))
            order = ", in another order" if shared == len(mine) == len(teacher.class_names) else ""
            raise MethodError(
                f"'{self.name}' compares logits class by class, but teacher and student share "
                f"{shared} of {len(mine)} classes{order}; use refilled or rkd"
            )


def list_methods() -> list[str]:
    """Return the names of the methods in this package, which are the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_method(name: str) -> Method:
    """Return a method by its name, or by the path of your own file whose function has the name of the file.

    Raises:
        MethodError: The method does not exist, or the file does not define the function.
    """
    if name.endswith(".py"):
        module = _import_file(Path(name))
        name = Path(name).stem
    elif name in list_methods():
        module = importlib.import_module(f"{__name__}.{name}")
    else:
        raise MethodError(unknown("method", name, list_methods()))
    function = getattr(module, name, None)
    if not callable(function):
        raise MethodError(f"{module.__file__} must define the function {name}(student, teacher, *, ...)")
    return Method(name, function)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise MethodError(f"no method file {path}; give a Python file that defines a function of the same name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise MethodError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _read(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value``, which may be text from the command line, to the type of an annotation."""
    if get_origin(hint) is UnionType:
        if NoneType in get_args(hint) and value in (None, "none", "None"):
            return None
        (hint,) = (option for option in get_args(hint) if option is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise MethodError(f"{name}={value}: {unknown('choice', str(value), map(str, get_args(hint)))}")
        return value
    if hint is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise MethodError(f"{name}={value}: must be true or false")
        return value.lower() == "true"
    try:
        return hint(value)
    except (TypeError, ValueError):
        raise MethodError(f"{name}={value}: must be {getattr(hint, '__name__', hint)}") from None
