"""Living masks by their digest, which is all that a compiled graph holds of a mask."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpbench.masks.head_masks import Mask

MOST_KEPT = 1024  # masks that were looked up last are kept alive, for backward passes to come

_LIVING: weakref.WeakValueDictionary[str, Mask] = weakref.WeakValueDictionary()
_KEPT: OrderedDict[str, Mask] = OrderedDict()


class PickledByFields:
    """A frozen dataclass whose copies hold its fields alone, not what was computed from them."""

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def register(mask: Mask, digest: str) -> str:
    """Make a mask known by its digest, as long as it or another equal to it lives.

    Returns:
        The digest.
    """
    known = _LIVING.setdefault(digest, mask)
    if known is not mask:
        mask.__dict__["_known_equal"] = known  # keeps it alive
    return digest


def find_mask(digest: str) -> Mask:
    """A mask with this digest.

    Raises:
        LookupError: if none lives.
    """
    mask = _LIVING.get(digest)
    if mask is None:
        raise LookupError("the mask of this compiled attention no longer exists: keep a reference")
    _KEPT[digest] = mask
    _KEPT.move_to_end(digest)
    if len(_KEPT) > MOST_KEPT:
        _KEPT.popitem(last=False)
    return mask
