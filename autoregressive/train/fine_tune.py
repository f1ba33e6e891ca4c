"""Weights of a GPT of other classes as a start: its class table is made anew, everything else stays as it is.

C classes of the given weights, D width. The last row of a table is the null class, which stands for no class in guidance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from utils.cli import InputError

TABLE = "cls_embedding.embedding_table.weight"


def fitted(
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    classes: Sequence[str],
    num_classes: int,
    tokens: int,
    init_classes: Sequence[str] = (),
) -> tuple[dict[str, Tensor], str]:
    """The weights with a class table for `num_classes` classes, and what was changed in one line; "" for nothing.

    about: plain data of the file that the weights are of: `classes`, `config`. classes: names of the new ones, if they have
    any. tokens: codes of an image now. A new class begins as the old one that `NAME=OLD` of init_classes says (names, or
    numbers from 0), else as one of the same name, else as the mean of the old ones. The null class is kept. Weights for as
    many classes, of the same names or of none, stay as they are. Raises InputError for init_classes that name no class.
    """
    done, was = [], (about.get("config") or {}).get("block_size")
    if isinstance(was, int) and was != tokens:
        sides = [f"{math.isqrt(codes)}x{math.isqrt(codes)}" for codes in (was, tokens)]
        done.append(f"grid of {sides[0]} codes, now {sides[1]}")
    table = state.get(TABLE)
    if table is None or table.dim() != 2 or len(table) < 2:  # it fits no GPT; check_weights refuses it
        return dict(state), ""
    old = _names(about.get("classes"), len(table) - 1)
    new = _names(classes, num_classes)
    named = bool(about.get("classes")) and bool(classes)
    chosen = _chosen(init_classes, new, old)
    if not chosen and len(old) == len(new) and (not named or old == new):
        return dict(state), "; ".join(done)
    by_name = {name: i for i, name in enumerate(old)} if named else {}
    rows = [chosen.get(i, by_name.get(name)) for i, name in enumerate(new)]
    mean = table[:-1].float().mean(0).to(table.dtype)
    made = torch.stack([mean if row is None else table[row] for row in rows] + [table[-1]])
    means = rows.count(None)
    kinds = {"by --init-classes": len(chosen), "by name": len(rows) - len(chosen) - means, "as the mean": means}
    parts = ", ".join(f"{count} {how}" for how, count in kinds.items() if count)
    done.append(f"class table of {len(old)} classes made anew for {len(new)} ({parts}); null class kept")
    return {**state, TABLE: made}, "; ".join(done)


def _names(names: Sequence[str] | None, number: int) -> list[str]:
    """The names of so many classes; numbers where they have none."""
    return [str(name) for name in names] if names and len(names) == number else [str(i) for i in range(number)]


def _chosen(init_classes: Sequence[str], new: Sequence[str], old: Sequence[str]) -> dict[int, int]:
    """The new class's number -> the old one's."""
    chosen: dict[int, int] = {}
    new_numbers, old_numbers = _numbers(new), _numbers(old)
    for text in init_classes:
        name, _, source = text.rpartition("=")
        for wanted, numbers, known, what in (
            (name, new_numbers, new, "the data have"), (source, old_numbers, old, "the weights have"),
        ):  # fmt: skip
            if wanted not in numbers:
                raise InputError(
                    f"--init-classes {text}: expected NAME=OLD, but {what} no class {wanted!r}; they have "
                    f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
                )
        if new_numbers[name] in chosen:
            raise InputError(f"--init-classes names {name!r} twice")
        chosen[new_numbers[name]] = old_numbers[source]
    return chosen


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """The numbers of classes by their numbers as text and by their names; of a name that stands twice the first."""
    return {str(i): i for i in range(len(names))} | {name: i for i, name in reversed(list(enumerate(names)))}
