"""What tells the groups of a report apart, and how it is called.

An axis is one config key, or a few that are read as one: the data set, the population and its cohort, the partition, a
learning rate. Together the axes cover every key: two groups with the same label on all axes and the same method label
are the same group, and the tables rely on that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, TypeAlias, get_args

from fedpeft_dist.config.schema import DataSection, MethodConfig, ParticipationConfig
from fedpeft_dist.reports.runs import plain

Keys: TypeAlias = dict[str, Any]
"""Dotted config key to value: what a group's runs have in common."""
DATA_SET, BACKBONE, POPULATION, PARTITION, PRIVACY = "data set", "backbone", "clients", "partition", "privacy"
PARTICIPATION = "participation"
MAX_TRAIN, NUM_CLIENTS, COHORT = "data.max_train", "data.clients", "federation.cohort"
CHECKPOINT = "backbone.checkpoint"
NO_GUARANTEE = "paper_noise"
"""The one mechanism that is no differential privacy."""
PARTITION_KIND = "kind of partition"
"""Its name without its alpha; with NUM_CLIENTS and COHORT a coarser axis, for the communication table."""
SPEAKING = (DATA_SET, BACKBONE, POPULATION, NUM_CLIENTS, PARTICIPATION, PARTITION, PARTITION_KIND)
"""Axes whose labels say by themselves what they are."""
_BARE_KEYS = {
    DATA_SET: ("data.path", "data.subset"),
    PARTITION: ("data.partition.alpha",),
    PRIVACY: ("privacy.epsilon",),
}
"""Their values are always told, right after the name: `dirichlet 0.1`."""
_METHOD_DEFAULTS = {
    get_args(method.model_fields["name"].annotation)[0]: {
        f"method.{key}": plain(field.default) for key, field in method.model_fields.items()
    }
    for method in get_args(get_args(MethodConfig)[0])
}
"""What a method's label leaves out, by the method's name."""
_PARTICIPATION = "federation.participation."
_PARTICIPATION_DEFAULTS = {
    f"{_PARTICIPATION}{key}{'.name' * hasattr(value, 'name')}": getattr(value, "name", value)
    for key, value in ParticipationConfig()
}
"""What the label of participation leaves out."""
_ABSENT = "-"


@dataclass(frozen=True)
class AxisValue:
    label: str
    order: tuple = ()
    """What values of this axis are sorted by."""
    number: int | float | None = None
    """The config's number or boolean, as it is, where the axis is one key and has one."""


@dataclass(frozen=True)
class Axes:
    settings: tuple[str, ...]
    """What is asked of a method: data, clients, partition, rounds."""
    options: tuple[str, ...]
    """How a method is trained: rates, optimizers."""
    told: dict[str, tuple[str, ...]]
    """By axis, the config keys that its label gives."""
    methods: tuple[str, ...]
    """Each group's label of its method."""
    values: tuple[dict[str, AxisValue], ...]
    """Each group's value on every axis."""


def find_axes(groups: Sequence[Keys], populations: Sequence[int | None]) -> Axes:
    """
    Args:
        populations: how many clients a group's partition had, where that is known.
    """
    files = _short_paths({group[CHECKPOINT] for group in groups} - {None})
    groups = [{**group, CHECKPOINT: files.get(group[CHECKPOINT])} for group in groups]
    keys = sorted({key for group in groups for key in group})
    method_keys = [key for key in keys if key.startswith("method.")]
    own_data = [k for k in keys if k.startswith("data.") and k.split(".")[1] not in DataSection.model_fields]
    composite = {
        DATA_SET: ["data.name", *(key for key in own_data if key != "data.name")],
        BACKBONE: ["backbone.name", CHECKPOINT, "backbone.model_args"],
        MAX_TRAIN: [MAX_TRAIN],
        POPULATION: [NUM_CLIENTS, COHORT],
        PRIVACY: ["privacy.name", *(key for key in keys if key.startswith("privacy.") and key != "privacy.name")],
        PARTICIPATION: _participation_keys(keys),
        PARTITION: _partition_keys(keys),
    }
    covered = {key for found in composite.values() for key in found} | set(method_keys)
    single = [key for key in keys if key not in covered]
    settings = (*composite, *(key for key in single if key.startswith(("data.", "federation."))))
    options = tuple(key for key in single if key not in settings)

    shown, earlier = {}, []
    for axis, found in composite.items():
        shown[axis] = _telling_options(groups, found, [*earlier, found[0], *_BARE_KEYS.get(axis, ())])
        earlier += found
    values = []
    for group, population in zip(groups, populations):
        axes = {key: _single(group, key) for key in (*single, NUM_CLIENTS, COHORT)}
        for axis, found in composite.items():
            label = _composite_label(axis, found, group, population, shown[axis])
            axes[axis] = _axis_value(label, group, found)
        axes[PARTITION_KIND] = _single(group, "data.partition.name")
        axes[NUM_CLIENTS] = replace(axes[NUM_CLIENTS], label=f"N={group[NUM_CLIENTS] or 'all'}")
        if group[CHECKPOINT] is None:
            axes["backbone.pretrained"] = AxisValue(_ABSENT)  # the method's label tells it
        values.append(axes)
    told = {axis: (found[0], *_BARE_KEYS.get(axis, ()), *shown[axis]) for axis, found in composite.items()}
    told |= {axis: (axis,) for axis in (*single, NUM_CLIENTS, COHORT)}
    told |= {POPULATION: (NUM_CLIENTS, COHORT), PARTITION_KIND: ("data.partition.name",)}
    options_shown = _varying_options(groups, method_keys, "method.name")
    methods = tuple(_method_label(group, options_shown) for group in groups)
    return Axes(settings, options, told, methods, tuple(values))


def _method_label(group: Keys, shown: dict[Any, list[str]]) -> str:
    name = group["method.name"]
    told = [key for key in shown.get(name, ()) if group.get(key) != _METHOD_DEFAULTS[name].get(key)]
    scratch = group[CHECKPOINT] is None and not group["backbone.pretrained"]
    return _choice(group, "method.name", told) + (" from scratch" if scratch else "")


def _short_paths(paths: Iterable[str]) -> dict[str, str]:
    """By path, as many of its last parts as tell it from the others: in most cases the file's name."""
    parts = {path: PurePath(path).parts for path in paths}
    return {
        path: next(
            "/".join(found[-length:])
            for length in range(1, len(found) + 1)
            if length == len(found)
            or all(other[-length:] != found[-length:] for o, other in parts.items() if o != path)
        )
        for path, found in parts.items()
    }


def _partition_keys(keys: list[str]) -> list[str]:
    first = ["data.partition.name", "data.partition.alpha"]
    return [*first, *(key for key in keys if key.startswith("data.partition.") and key not in first)]


def _participation_keys(keys: list[str]) -> list[str]:
    """What is chosen comes before its details, which vary along with it."""
    first = f"{_PARTICIPATION}name"
    found = [key for key in keys if key.startswith(_PARTICIPATION) and key != first]
    return [first, *sorted(found, key=lambda key: (not key.endswith((".name", ".late")), key))]


def _varying_options(groups: Sequence[Keys], keys: Iterable[str], name_key: str) -> dict[Any, list[str]]:
    """For each choice's name, the keys that have more than one value among the groups with this choice."""
    values: dict[Any, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for group in groups:
        for key in keys:
            values[group.get(name_key)][key].add(repr(group.get(key, _ABSENT)))
    return {name: [k for k, v in found.items() if len(v) > 1 and k != name_key] for name, found in values.items()}


def _telling_options(groups: Sequence[Keys], keys: Iterable[str], given: Iterable[str]) -> list[str]:
    """Those of a section's keys that split what the given ones leave together: not those that vary along with them."""
    chosen = list(given)
    telling = []
    for key in keys:
        if len({_values(g, [*chosen, key]) for g in groups}) > len({_values(g, chosen) for g in groups}):
            chosen.append(key)
            telling.append(key)
    return telling


def _values(group: Keys, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(repr(group.get(key, _ABSENT)) for key in keys)


def _choice(keys: Keys, name_key: str, shown: Sequence[str], bare: Sequence[str] = ()) -> str:
    """`adapter (bottleneck 8, shared false)`; the values of the `bare` keys follow the name at once."""
    head = " ".join(show(keys[key]) for key in (name_key, *bare) if keys.get(key) is not None)
    options = [f"{key.rpartition('.')[2]} {show(keys[key])}" for key in shown if keys.get(key) is not None]
    return f"{head} ({', '.join(options)})" if options else head


def _composite_label(axis: str, found: Sequence[str], keys: Keys, population: int | None, shown: Sequence[str]) -> str:
    if axis == POPULATION:
        return _population(keys, population)
    if axis == MAX_TRAIN:
        return "all" if keys.get(axis) is None else show(keys[axis])
    if axis == PARTICIPATION:
        return _participation(keys, shown)
    if axis == PRIVACY:
        return _privacy(keys, shown)
    return _choice(keys, found[0], shown, _BARE_KEYS.get(axis, ()))


def _participation(keys: Keys, shown: Sequence[str]) -> str:
    """`uniform (devices lognormal, late partial)`, without what is as it is by default."""
    told = []
    for key in shown:
        if keys.get(key) is not None and keys[key] != _PARTICIPATION_DEFAULTS.get(key):
            words = key.removeprefix(_PARTICIPATION).removesuffix(".name").replace(".", " ").replace("_", " ")
            told.append(f"{words} {show(keys[key])}")
    name = show(keys.get(f"{_PARTICIPATION}name", _ABSENT))
    return f"{name} ({', '.join(told)})" if told else name


def _privacy(keys: Keys, shown: Sequence[str]) -> str:
    """`sample (epsilon 5)`; what carries no guarantee says so, and that its epsilon is but a number."""
    name = show(keys.get("privacy.name", _ABSENT))
    told = [f"{key.removeprefix('privacy.')} {show(keys[key])}" for key in shown if keys.get(key) is not None]
    epsilon = keys.get("privacy.epsilon")
    if name == NO_GUARANTEE:
        told = ["no guarantee", f"nominal epsilon {show(epsilon)}", *told]
    elif epsilon is not None:
        told = [f"epsilon {show(epsilon)}", *told]
    return f"{name} ({', '.join(told)})" if told else name


def _population(keys: Keys, population: int | None) -> str:
    """The paper's N and C, as far as they are known: a natural partition's population stands in no config."""
    number, cohort, every = keys[NUM_CLIENTS], keys[COHORT], ""
    if number is None:
        number, every = population, "all "
    if not number:
        return f"N=all, M={cohort:,}"
    share = f"{cohort / number:.4g}"
    exact = round(float(share) * number, 6) == cohort
    return f"N={every}{number:,}, " + (f"C={share}" if exact else f"M={cohort:,}")


def _single(keys: Keys, key: str) -> AxisValue:
    return _axis_value(show(keys[key]) if key in keys else _ABSENT, keys, [key])


def _axis_value(label: str, keys: Keys, names: Sequence[str]) -> AxisValue:
    value = keys.get(names[0]) if len(names) == 1 else None
    return AxisValue(label, _order(keys, names), value if isinstance(value, int | float) else None)


def _order(keys: Keys, names: Iterable[str]) -> tuple:
    """Numbers by size, then words, then null."""
    found = [keys.get(name) for name in names]
    return tuple(
        (2, 0, "") if v is None else (0, float(v), "") if isinstance(v, int | float) else (1, 0, str(v)) for v in found
    )


def show(value: Any) -> str:
    """A config's value in a label."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def short_names(axes: Iterable[str]) -> dict[str, str]:
    """Dotted keys by as much of their end as tells them apart; `x.name` is called x."""
    axes = list(axes)
    plain = {axis: axis.removesuffix(".name") for axis in axes}
    names = {}
    for axis in axes:
        parts = plain[axis].split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        taken = [other for key, other in plain.items() if key != axis]
        names[axis] = next(
            (end for end in ends if not any(other == end or other.endswith("." + end) for other in taken)), axis
        )
    return names
