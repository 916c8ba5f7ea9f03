"""Slow versions of the library's formulas, in plain loops over Python floats, to compare with."""

from math import exp, inf, log, sqrt

Rows = list[list[float]]


def unit(row: list[float]) -> list[float]:
    length = sqrt(sum(x * x for x in row))
    return [x / length for x in row] if length > 0 else row


def squared_distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def unit_distances(rows: Rows) -> Rows:
    units = [unit(row) for row in rows]
    return [[sqrt(squared_distance(a, b)) for b in units] for a in units]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def semi_hard(rows: Rows, labels: list[int], margin: float = inf) -> dict[tuple[int, int], list[int]]:
    """All impostors of each pair (anchor, positive) that are farther than the positive by up to ``margin``."""
    d = unit_distances(rows)
    images = range(len(rows))
    return {
        (i, j): [k for k in images if labels[k] != labels[i] and 0 < d[i][k] - d[i][j] <= margin]
        for i in images
        for j in images
        if i != j and labels[i] == labels[j]
    }


def nearest_triplets(rows: Rows, labels: list[int]) -> set[tuple[int, int, int]]:
    d = unit_distances(rows)
    mined = semi_hard(rows, labels).items()
    return {(i, j, min(impostors, key=lambda k: d[i][k])) for (i, j), impostors in mined if impostors}


def all_triplets(rows: Rows, labels: list[int], margin: float) -> set[tuple[int, int, int]]:
    return {(i, j, k) for (i, j), impostors in semi_hard(rows, labels, margin).items() for k in impostors}


def alignment(groups: list[tuple[int, list[int]]], student: Rows, teacher: Rows, tau_s: float, tau_t: float) -> float:
    """Sum of KL(teacher || student) between softmaxes of ``-d / tau`` over each group (anchor, images)."""
    d_s, d_t = unit_distances(student), unit_distances(teacher)
    return sum(
        kl(softmax([-d_t[i][k] / tau_t for k in images]), softmax([-d_s[i][k] / tau_s for k in images]))
        for i, images in groups
    )


def triplet_alignment(student: Rows, teacher: Rows, labels: list[int], tau_s: float, tau_t: float) -> float:
    groups = [(i, [j, k]) for i, j, k in nearest_triplets(student, labels)]
    return alignment(groups, student, teacher, tau_s, tau_t)


def tuple_alignment(
    student: Rows, teacher: Rows, labels: list[int], tau_s: float, tau_t: float, margin: float
) -> float:
    groups = [(i, [j, *impostors]) for (i, j), impostors in semi_hard(student, labels, margin).items()]
    return alignment(groups, student, teacher, tau_s, tau_t)


def mean(rows: Rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def local_kd(
    logits: Rows,
    teacher: Rows,
    labels: list[int],
    tau_s: float,
    tau_t: float,
    *,
    leave_one_out: bool = False,
    centers: Rows | None = None,
    every: bool = False,
    right_only: bool = False,
) -> float:
    """Mean KL over the batch's classes, or every one, between nearest-class-mean and student probabilities."""
    classes = range(len(logits[0])) if every else sorted(set(labels))

    def center(c: int, image: int) -> list[float]:
        if centers is not None:
            return centers[c]
        members = [n for n, label in enumerate(labels) if label == c]
        others = [n for n in members if n != image]
        return mean([teacher[n] for n in (others if leave_one_out and others else members)])

    total = 0.0
    for n, row in enumerate(teacher):
        q = softmax([-squared_distance(row, center(c, n)) / tau_t for c in classes])
        if right_only and classes[q.index(max(q))] != labels[n]:
            continue
        total += kl(q, softmax([logits[n][c] / tau_s for c in classes]))
    return total / len(labels)


Maps = list[list[list[float]]]
"""Feature maps of images, as image, channel, place."""


def attention_distance(student: Maps, teacher: Maps) -> float:
    """Mean over images and places of the squared difference of unit-length channel energies."""

    def attend(channels: Rows) -> list[float]:
        return unit([sum(x * x for x in place) / len(channels) for place in zip(*channels, strict=True)])

    differences = [
        (a - b) ** 2 for s, t in zip(student, teacher, strict=True) for a, b in zip(attend(s), attend(t), strict=True)
    ]
    return sum(differences) / len(differences)


def mean_discrepancy(student: Maps, teacher: Maps) -> float:
    """Squared MMD with the kernel (xᵀy)² between the unit-length channels of each image, averaged over images."""

    def kernel(a: Rows, b: Rows) -> float:
        values = [sum(x * y for x, y in zip(unit(p), unit(q), strict=True)) ** 2 for p in a for q in b]
        return sum(values) / len(values)

    images = [kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in zip(student, teacher, strict=True)]
    return sum(images) / len(images)


def similarity_distance(student: Rows, teacher: Rows) -> float:
    """Mean squared difference between the row-normalised Gram matrices of two sets of rows."""

    def similar(rows: Rows) -> Rows:
        return [unit([sum(x * y for x, y in zip(a, b, strict=True)) for b in rows]) for a in rows]

    pairs = zip(similar(student), similar(teacher), strict=True)
    return sum(squared_distance(a, b) for a, b in pairs) / len(student) ** 2


def contrast(s: Rows, t: Rows, labels: list[int], bank: Rows, bank_labels: list[int], tau: float) -> float:
    """Mean negative log-probability of an image's own row of t among the rows of the bank of other classes."""
    total = 0.0
    for row, own, label in zip(s, t, labels, strict=True):
        others = [b for b, c in zip(bank, bank_labels, strict=True) if c != label]
        scores = [sum(x * y for x, y in zip(row, other, strict=True)) / tau for other in [own, *others]]
        total -= log(softmax(scores)[0])
    return total / len(labels)


def decoupled(logits: Rows, teacher: Rows, labels: list[int], temperature: float) -> tuple[float, float]:
    """Mean KL over target against rest, and over the other classes renormalised, times the squared temperature."""
    target = others = 0.0
    for z_s, z_t, label in zip(logits, teacher, labels, strict=True):
        p, q = (softmax([z / temperature for z in row]) for row in (z_t, z_s))
        others_p, others_q = ([x for c, x in enumerate(row) if c != label] for row in (p, q))
        target += kl([p[label], sum(others_p)], [q[label], sum(others_q)])
        others += kl([x / sum(others_p) for x in others_p], [x / sum(others_q) for x in others_q])
    return temperature**2 * target / len(labels), temperature**2 * others / len(labels)
