"""The paper's tables and figures as data: rows, columns, and the numbers that it prints.

References:
    Ye, Lu and Zhan, Distilling Cross-Task Knowledge via Relationship Matching, CVPR 2020, with its supplement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from refilled.paper.schema import Column, FewShotRow, Row, Table
from refilled.presets import PRESETS

_WRNS = {"(40, 2)": "wrn_40_2", "(16, 2)": "wrn_16_2", "(40, 1)": "wrn_40_1", "(16, 1)": "wrn_16_1"}
_WIDTHS = {"1": "mobilenet_1", "0.75": "mobilenet_0.75", "0.5": "mobilenet_0.5", "0.25": "mobilenet_0.25"}

_METHODS = {
    "Student": "vanilla",
    "KD": "kd",
    "FitNet": "fitnet",
    "AT": "at",
    "NST": "nst",
    "VID-I": "vid",
    "KD+VID-I": "kd_vid",
    "RKD": "rkd",
    "ReFilled": "refilled",
}


def _columns(protocol: str, students: Mapping[str, str], prefix: str = "") -> tuple[Column, ...]:
    return tuple(Column(f"{prefix}{name}", protocol, student) for name, student in students.items())


def _rows(paper: Mapping[str, Sequence[float]]) -> tuple[Row, ...]:
    return tuple(Row(name, _METHODS[name], tuple(numbers)) for name, numbers in paper.items())


def _of_the_teacher(columns: Sequence[Column], paper: Mapping[str, tuple[float, float, float]]) -> tuple[Row, ...]:
    """Return the rows that classify by the teacher's embedding, which has a single width (supplement 2.1)."""
    one_nn, lr, fine_tune = (tuple(paper[c.name][n] if c.name in paper else None for c in columns) for n in range(3))
    return (
        Row("1NN", "nearest_neighbour", one_nn, columns=tuple(paper), epochs=0),
        Row("LR", "linear_probe", lr, columns=tuple(paper), epochs=0),
        # 50 epochs where the student has 400, at a rate so low that nothing is learned from scratch.
        Row("Fine-tune", "fine_tune", fine_tune, columns=tuple(paper), epochs=50 / 400, lr=1e-4),
    )


_STAGE_1 = {"kd_weight": 0.0}
_FIXED = {"kd_decay": 0.0}

_TABLE_1 = _rows(
    {
        "Student": (71.25, 67.56, 66.85, 64.48),
        "RKD": (70.83, 68.80, 67.44, 63.97),
        "ReFilled": (73.38, 70.42, 69.77, 67.10),
    }
)
_TABLE_2 = _rows(
    {
        "Student": (74.44, 70.15, 68.97, 65.44),
        "KD": (75.47, 71.87, 70.46, 66.54),
        "FitNet": (74.29, 70.89, 68.66, 65.38),
        "AT": (74.76, 71.06, 69.85, 65.31),
        "NST": (74.81, 71.19, 68.00, 64.95),
        "VID-I": (75.25, 73.31, 71.51, 66.32),
        "KD+VID-I": (76.11, 73.69, 72.16, 67.19),
        "RKD": (76.62, 72.56, 72.18, 65.22),
        "ReFilled": (77.49, 74.01, 72.72, 67.56),
    }
)
# Not in the paper: RKD in one stage, recent baselines for a teacher of the same classes, and our preset.
_NO_NUMBERS = (None,) * 4  # of the columns
_RKD_ELSEWHERE = Row("RKD, one stage", "rkd", _NO_NUMBERS, {"joint": True})
_BARS = (
    # The authors raise the weight over the first 20 of 240 epochs (Zhao et al., CVPR 2022).
    Row("DKD", "dkd", _NO_NUMBERS, shares={"warmup_epochs": 20 / 240}),
    Row("KD, standardised", "kd", _NO_NUMBERS, {"standardize": True, "temperature": 2.0, "kd_weight": 9.0}),
)
_OURS = Row("ReFilled, good", "refilled", _NO_NUMBERS, PRESETS["good"]["settings"])
_BY_WIDTH = _columns("cross-task hard", _WIDTHS)
_BY_SPLIT_AND_WIDTH = (
    *_columns("cross-task easy", _WIDTHS, "easy "),
    *_columns("cross-task hard", _WIDTHS, "hard "),
)

# The best of a few settings on tasks of CIFAR-FS's validation classes (docs/fewshot.md). A random classifier and
# statistics of a few images damage the initial network.
_START_OF_A_TASK: Mapping[str, Any] = {"classifier": "probe", "norm": "frozen", "lr": 0.003}
# Also the best of a few: means instead of sums over the few triplets, and a low temperature for the teacher.
_REFILLED_OF_A_TASK: Mapping[str, Any] = {
    **_START_OF_A_TASK,
    "reduction": "mean",
    "triplet_weight": 0.1,
    "embedding_share": 0.3,
    "centers": "global",
    "normalize": True,
    "kd_temperature": 0.2,
    "kd_weight": 1.0,
    "kd_decay": 0.0,
    "kd_average": "images",
}
_STUDENT_OF_A_TASK: Mapping[str, Any] = {"trains": "student", "costly": True}
_LEARNING_RATES = {"lr": "0.001..0.1:log"}


def _shots(protocol: str, *numbers: int) -> tuple[Column, ...]:
    return tuple(Column(f"{number}-shot", protocol, "convnet4", shots=number) for number in numbers)


_TABLE_S3 = (
    FewShotRow("1NN", "nearest_neighbour", (49.73, 63.11, 66.56, 69.80)),
    FewShotRow("SVM", "svm", (51.61, 69.17, 74.24, 77.87), search={"c": "0.01..100:log"}),
    FewShotRow("LR", "linear", (None,) * 4, search={"c": "0.01..100:log"}),
    FewShotRow(
        "Fine-Tune",
        "fine_tune",
        (45.89, 68.61, 74.95, 78.62),
        {"layers": "all", **_START_OF_A_TASK},
        search={"lr": "0.0001..0.1:log"},
        trains="backbone",
        costly=True,
    ),
    FewShotRow("MAML", "maml", (48.70, 63.11, None, None), columns=("1-shot", "5-shot"), costly=True),
    FewShotRow("ProtoNet", "protonet", (51.79, 70.38, 74.42, 78.10)),
    FewShotRow("FEAT", "feat", (55.15, 71.61, 74.86, 78.84)),
    FewShotRow("1NN on ResNet", "nearest_neighbour", (None,) * 4, backbone="resnet12"),
    FewShotRow("LR on ResNet", "linear", (None,) * 4, backbone="resnet12", search={"c": "0.01..100:log"}),
    FewShotRow(
        "RKD from ResNet",
        "rkd",
        (None,) * 4,
        _START_OF_A_TASK,
        backbone="resnet12",
        search=_LEARNING_RATES,
        **_STUDENT_OF_A_TASK,
    ),
    FewShotRow(
        "ReFilled from ResNet",
        "refilled",
        (54.82, 71.97, 76.42, 80.33),
        _REFILLED_OF_A_TASK,
        backbone="resnet12",
        search={**_LEARNING_RATES, "kd_weight": "0.1..10:log"},
        **_STUDENT_OF_A_TASK,
    ),
    FewShotRow(
        "ReFilled from ConvNet",
        "refilled",
        (53.44, 70.60, 75.37, 78.94),
        _REFILLED_OF_A_TASK,
        search={**_LEARNING_RATES, "kd_weight": "0.1..10:log"},
        **_STUDENT_OF_A_TASK,
    ),
)
_TASKS = "accuracy in percent on the query images of tasks of the unseen classes"

TABLES: Mapping[str, Table] = {
    table.name: table
    for table in (
        Table(
            "table1",
            "Table 1: cross-task distillation on CUB, by width of the student",
            _BY_WIDTH,
            (*_of_the_teacher(_BY_WIDTH, {"1": (45.31, 53.82, 65.72)}), *_TABLE_1, _RKD_ELSEWHERE, _OURS),
        ),
        Table(
            "table2",
            "Table 2: same-task distillation on CIFAR-100, by (depth, width) of the student",
            _columns("cifar100", _WRNS),
            (*_TABLE_2, _RKD_ELSEWHERE, *_BARS, _OURS),
            teacher=74.44,
        ),
        Table(
            "table3",
            "Table 3: same-task distillation on CUB, by width of the student",
            _columns("cub", _WIDTHS),
            _rows(
                {
                    "Student": (75.36, 74.87, 72.41, 69.72),
                    "KD": (77.61, 76.02, 74.24, 72.03),
                    "FitNet": (75.10, 75.03, 72.17, 69.09),
                    "AT": (76.22, 76.10, 73.70, 70.74),
                    "NST": (76.91, 77.05, 74.03, 71.54),
                    "KD+VID-I": (77.03, 76.91, 75.62, 72.23),
                    "RKD": (77.72, 76.80, 74.99, 72.55),
                    "ReFilled": (78.95, 78.01, 76.11, 73.42),
                }
            ),
            teacher=75.36,
        ),
        Table(
            "table4",
            "Table 4: does triplet alignment help the embedding? CIFAR-100, by (depth, width)",
            _columns("cifar100", _WRNS),
            (
                Row("without alignment", "vanilla", (56.50, 54.91, 54.02, 51.77), measure="nmi"),
                Row("after alignment", "refilled", (59.63, 57.98, 57.62, 54.39), measure="nmi after stage 1"),
            ),
            unit="normalised mutual information of classes and k-means clusters of the test images, times 100",
        ),
        Table(
            "table5",
            "Table 5: distillation against local distillation, both after stage 1; CIFAR-100, by (depth, width)",
            _columns("cifar100", _WRNS),
            (
                Row("KD", "refilled", (77.08, 73.57, 72.24, 67.14), {"kd_targets": "logits"}),
                Row("local KD", "refilled", (77.49, 74.01, 72.72, 67.56)),
            ),
        ),
        Table(
            "table6",
            "Table 6: a teacher of another family on CIFAR-100, by width of the student",
            _columns("cifar100, another family", _WIDTHS),
            _rows(
                {
                    "Student": (68.57, 67.92, 65.66, 60.87),
                    "KD": (70.34, 68.21, 66.06, 61.38),
                    "FitNet": (67.99, 67.85, 65.12, 61.01),
                    "AT": (68.97, 67.88, 66.44, 62.15),
                    "NST": (70.62, 70.49, 69.15, 61.32),
                    "KD+VID-I": (71.94, 70.13, 68.51, 62.50),
                    "RKD": (70.41, 68.93, 66.24, 61.44),
                    "ReFilled": (73.81, 72.88, 70.02, 63.15),
                }
            ),
            teacher=74.09,
        ),
        Table(
            "s1",
            "Table S1: parts of ReFilled in cross-task distillation on CUB, two splits of the classes, by width",
            _BY_SPLIT_AND_WIDTH,
            (
                *_of_the_teacher(
                    _BY_SPLIT_AND_WIDTH, {"easy 1": (49.23, 56.77, 66.94), "hard 1": (45.31, 53.82, 65.72)}
                ),
                Row("Student", "vanilla", (70.04, 68.13, 66.44, 64.63, 71.25, 67.56, 66.85, 64.48)),
                Row("RKD", "rkd", (71.10, 68.81, 67.15, 64.28, 70.83, 68.80, 67.44, 63.97)),
                Row(
                    "stage 1 + CE",
                    "refilled",
                    (71.62, 70.27, 70.15, 66.75, 71.90, 69.14, 68.91, 65.38),
                    _STAGE_1,
                ),
                Row(
                    "stage 1 + LKD, fixed weight",
                    "refilled",
                    (71.93, 70.73, 70.88, 67.41, 72.53, 70.01, 69.50, 66.42),
                    _FIXED,
                ),
                Row("ReFilled", "refilled", (72.48, 71.04, 71.35, 67.87, 73.38, 70.42, 69.77, 67.10)),
            ),
        ),
        Table(
            "s2",
            "Table S2: a teacher of another family on CUB, by width of the student",
            _columns("cub, another family", {name: _WIDTHS[name] for name in ("0.75", "0.5", "0.25")}),
            _rows(
                {
                    "Student": (74.87, 72.41, 69.72),
                    "KD": (76.02, 74.17, 71.97),
                    "FitNet": (75.03, 72.17, 70.03),
                    "AT": (76.11, 72.94, 70.99),
                    "NST": (75.89, 73.82, 71.92),
                    "KD+VID-I": (76.41, 74.04, 72.20),
                    "RKD": (76.11, 75.24, 72.84),
                    "ReFilled": (78.01, 75.90, 73.15),
                }
            ),
            teacher=75.31,
        ),
        Table(
            "s4",
            "Table S4: one stage against two in cross-task distillation on CUB, by width of the student",
            _BY_WIDTH,
            (
                *_of_the_teacher(_BY_WIDTH, {"1": (45.31, 53.82, 65.72)}),
                *_TABLE_1,
                Row("ReFilled, one stage, 0.1", "refilled", (72.64, 70.13, 69.28, 66.41), {"gamma": 0.1}),
                Row("ReFilled, one stage, 0.2", "refilled", (72.42, 70.22, 68.65, 66.85), {"gamma": 0.2}),
            ),
        ),
        Table(
            "s5",
            "Table S5: one stage against two in same-task distillation on CIFAR-100, by (depth, width)",
            _columns("cifar100", _WRNS),
            (
                *_TABLE_2,
                Row("ReFilled, one stage, 0.1", "refilled", (77.03, 73.81, 72.30, 67.14), {"gamma": 0.1}),
                Row("ReFilled, one stage, 0.2", "refilled", (76.95, 73.90, 71.64, 67.34), {"gamma": 0.2}),
            ),
            teacher=74.44,
        ),
        Table(
            "figure3",
            "Figure 3: variants of ReFilled, and fewer training images per class; CUB across tasks",
            (
                *(Column(str(n), "cross-task hard", "mobilenet_1", shots=n) for n in (5, 10, 15, 20, 25, 30)),
                Column("all", "cross-task hard", "mobilenet_1"),
            ),
            (
                Row("Student", "vanilla", (*[None] * 6, 71.25)),
                Row("RKD", "rkd", (*[None] * 6, 70.83)),
                Row("stage 1 + CE", "refilled", (*[None] * 6, 71.90), _STAGE_1, ("all",)),
                Row("stage 1 + LKD, fixed weight", "refilled", (*[None] * 6, 72.53), _FIXED, ("all",)),
                Row("ReFilled", "refilled", (*[None] * 6, 73.38)),
            ),
            picture="lines",
            columns_are="training images per class",
            note="The figure prints no numbers: the paper's are those of Table S1, for the same runs. It does not say "
            "which methods and which width its right part shows; here they are those of the left part.",
        ),
        Table(
            "figure4",
            "Figure 4: embeddings of CIFAR-100 without alignment and after stage 1, (depth, width) = (16, 1)",
            _columns("cifar100", {"(16, 1)": "wrn_16_1"}),
            (
                Row("without alignment", "vanilla", (51.77,), measure="nmi"),
                Row("after alignment", "refilled", (54.39,), measure="nmi after stage 1"),
            ),
            unit="normalised mutual information of classes and k-means clusters of the test images, times 100",
            picture="t-SNE",
        ),
        Table(
            "figure-s1",
            "Figure S1: how much distillation adds to the classifier's gradient, by number of classes",
            tuple(Column(str(n), "cifar100", "wrn_16_2", classes=n) for n in (5, 10, 20, 30, 40, 50, 70, 100)),
            (
                Row("KD", None, (None,) * 8, measure="gradient of kd"),
                Row("local KD", None, (None,) * 8, measure="gradient of local kd"),
            ),
            unit="mean norm, over the classes, of what distillation adds to the classifier's gradient, times 1000",
            picture="lines",
            columns_are="classes",
            note="At initialisation, in batches of 128 images of classes drawn at random. The paper prints no numbers "
            "and does not name the student; here it is a WRN-16-2, and every term has weight 1.",
        ),
        Table(
            "table7",
            "Table 7: tasks of 10 and 30 images per class",
            _shots("few-shot", 10, 30),
            tuple(replace(row, paper=row.paper[2:]) for row in _TABLE_S3 if row.columns is None),
            unit=_TASKS,
            mean_over="tasks",
        ),
        Table(
            "s3",
            "Table S3: tasks of few images",
            _shots("few-shot", 1, 5, 10, 30),
            _TABLE_S3,
            unit=_TASKS,
            mean_over="tasks",
        ),
        Table(
            "s3-imagenet",
            "Table S3 again, with ImageNet's pictures at scale mini",
            _shots("few-shot, Tiny-ImageNet", 1, 5, 10, 30),
            _TABLE_S3,
            unit=_TASKS,
            mean_over="tasks",
        ),
    )
}
"""In the paper's order, figures after tables; few-shot tables, another protocol, at the end."""
